import pytest

from matchdistill.models.trust import OWN, check_trusted

HARMLESS = [
    ("torchvision:resnet18", {}),
    ("torchvision:retinanet_resnet50_fpn", {"min_size": 64}),
    ("timm:resnet18.a1_in1k", {"in_chans": 1}),
    ("matchdistill.models:small_resnet", {"width": 8}),
    ("matchdistill.models.small:small_resnet", {}),
    ("matchdistill.models.shufflenet:shufflenet_v2_x1_0", {}),
    ("matchdistill.models:detector", {"backbone": "timm:resnet18"}),
    ("transformers:upernet", {"backbone_config": {"model_type": "resnet", "backbone": None}}),
    (
        "transformers:detr",
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50", "use_pretrained_backbone": False}},
    ),
    (None, {}),
]
FOREIGN = [
    ("os:system", {"command": "true"}, "importing 'os' and calling 'system'"),
    ("mine:net", {}, "importing 'mine'"),
    # What a module of this package has imported is its attribute too.
    ("matchdistill.cli:os.system", {}, "calling 'os.system'"),
    ("matchdistill.models.build:importlib.import_module", {"name": "mine"}, "calling 'importlib.import_module'"),
    # Functions of this package that build what their arguments name, or write.
    ("matchdistill.models:build_model", {"name": "mine:net"}, "calling 'build_model'"),
    ("matchdistill.files:write_json", {"path": "x", "value": 1}, "calling 'write_json'"),
    ("matchdistill.cli:main", {"arguments": ["export", "x", "--trust"]}, "calling 'main'"),
    ("matchdistill.models:detector", {"backbone": "mine:net"}, "importing 'mine'"),
    ("timm.models:create_model", {}, "importing 'timm.models'"),
    ("torchvision.models:resnet18", {}, "importing 'torchvision.models'"),
    ("transformers.models:AutoModel", {"trust_remote_code": True}, "importing 'transformers.models'"),
    ("timm:resnet18", {"checkpoint_path": "x.pth"}, "the option checkpoint_path"),
    ("timm:resnet18", {"pretrained_cfg": {"file": "x.pth"}}, "the option pretrained_cfg"),
    ("transformers:upernet", {"backbone": "USER/NAME"}, "the option backbone"),
    (
        "transformers:upernet",
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "x"}},
        "the option backbone",
    ),
    *(
        (
            "transformers:detr",
            {"backbone_config": {"model_type": kind, "backbone": name, **more}},
            "the option backbone",
        )
        for kind, name, more in (
            ("timm_backbone", "local-dir:x", {"use_pretrained_backbone": False}),
            ("timm_backbone", "USER/NAME", {"use_pretrained_backbone": False}),
            ("timm_backbone", "resnet50", {"use_pretrained_backbone": True}),
            ("resnet", "resnet50", {"use_pretrained_backbone": False}),
        )
    ),
    ("timm:resnet18", {"more": [{"pretrained_cfg": {"file": "x.pth"}}]}, "the option pretrained_cfg"),
    ("resnet18", {}, "importing 'resnet18'"),
]


@pytest.mark.parametrize(("name", "options"), HARMLESS)
def test_networks_of_known_libraries(tmp_path, name, options):
    check_trusted(tmp_path, (name, options))


@pytest.mark.parametrize(("name", "options", "told"), FOREIGN)
def test_other_code_is_named(tmp_path, name, options, told):
    with pytest.raises(ValueError, match="--trust") as info:
        check_trusted(tmp_path, ("timm:resnet18", {}), (name, options))
    assert told in str(info.value)
    assert str(tmp_path) in str(info.value)
    assert "\n" not in str(info.value)


def test_the_networks_of_this_package_are_its_own():
    assert {name.rpartition(":")[2] for name in OWN} == {"small_resnet", "detector", "segmenter", "shufflenet_v2_x1_0"}
