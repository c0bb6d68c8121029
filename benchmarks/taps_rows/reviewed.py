"""Rows whose flags were looked at and are right as they are, with the reason."""

_HRNET = "the last sums of its branches: most of the weights lead to them, nothing flows through any earlier value"
_XCEPTION = (
    "timm names values beside a shortcut; the block's end before them is tapped, and they lead to the next position"
)
_STRIDE_16 = "the teacher ends at stride 16, so its last blocks go with what is coarser in the student, by depth"
_HEAD = "the convolution before the pooling works on the map, as MobileNet's last does"
_FINER = "the student's first stage is finer than any of the teacher's; its weights lead to the positions of the others"
_HYBRID = "Ultralytics counts RT-DETR's attention on the coarsest map to the head; the whole backbone leads to its end"
_ENCODERS = "each input has an encoder of its own; the second is no decoder of the first"
_BRANCHES = "branches of several resolutions beside each other, each with its own position"
REVIEWED: dict[str, str] = {
    "pair timm:hrnet_w18 -> timm:hrnet_w18_small @ 96": _HRNET,
    "pair timm:hrnet_w18 -> timm:resnet18 @ 96": _HRNET,
    "pair timm:xception65 -> timm:xception41 @ 128": _XCEPTION,
    "pair timm:xception41 -> timm:resnet18 @ 128": _XCEPTION,
    "pair timm:vgg16_bn -> timm:resnet18 @ 96": _STRIDE_16,
    "pair timm:vgg13_bn -> timm:mobilenetv2_100 @ 96": _STRIDE_16,
    "pair timm:volo_d1_224 -> timm:resnet18 @ 224": _STRIDE_16,
    "pair timm:crossvit_small_240 -> timm:crossvit_tiny_240 @ 240": _BRANCHES,
    "pair timm:crossvit_small_240 -> timm:vit_tiny_patch16_224 @ 240": _BRANCHES,
    "pair timm:tnt_b_patch16_224 -> timm:tnt_s_patch16_224 @ 64": "the pixels of TNT pass by every block; all of its "
    "weights lead to the last norm alone",
    "pair timm:efficientvit_b1 -> timm:efficientvit_b0 @ 128": _HEAD,
    "pair timm:resnet50 -> timm:efficientvit_b0 @ 96": _HEAD,
    "pair timm:cpubone_b0_bfrobust -> timm:cpubone_nano @ 224": _HEAD,
    "pair ultralytics:yolov8s-cls -> ultralytics:yolov8n-cls": _HEAD,
    "pair ultralytics:yolo11s-cls -> ultralytics:yolo11n-cls": _HEAD,
    "pair timm:resnet50 -> ultralytics:yolov8n-cls @ 128": _HEAD,
    "pair torchvision:swin3d_t -> torchvision:r3d_18 @ 64": _FINER,
    "pair torchvision:mvit_v1_b -> torchvision:r3d_18 @ 224": _FINER,
    "pair monai:SwinUNETR dims=3 -> monai:SegResNet dims=3 @ 64": _FINER,
    "pair ultralytics:rtdetr-l -> ultralytics:yolov8n": _HYBRID,
    "pair ultralytics:rtdetr-l -> ultralytics:yolo11n": _HYBRID,
    "pair ultralytics:rtdetr-resnet50 -> ultralytics:rtdetr-l": _HYBRID,
    "pair own:streams net=resnet34 -> own:streams net=resnet18": _ENCODERS,
    "pair open_clip:ViT-S-32 whole=True -> open_clip:ViT-M-32-alt whole=True": _ENCODERS,
}
