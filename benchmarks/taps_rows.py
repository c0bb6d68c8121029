"""The models and pairs that the choice of taps is measured on, and what was said of them when their rows were reviewed.

Names are those of `zoo.build`.
"""

# The smallest network of each family of timm that names its features: a family is a module of `timm.models` and the letters
# that its networks' names begin with. Those above 80 million parameters that can be cut are.
TIMM = """
beit_base_patch16_224 depth=4
beitv2_base_patch16_224 depth=4
botnet26t_256
eca_botnext26ts_256
halo2botnet50ts_256
halonet_h1
haloregnetz_b
lambda_resnet26t
lamhalobotnet50ts_256
sebotnet33ts_256
sehalonet33ts
bat_resnext26ts
eca_resnext26ts
gcresnet33ts
gcresnext26ts
gernet_s
mobileone_s1
regnetz_b16
repvgg_a0
resnet32ts
resnext26ts
seresnet33ts
seresnext26ts
cait_xxs24_224
coat_tiny
convit_tiny
convmixer_768_32
convnext_zepto_rms
convnextv2_atto
cpubone_nano
crossvit_tiny_240
csatv2
cs3darknet_focus_s
cspdarknet53
cspresnet50
cspresnext50
darknet17
darknetaa53
sedarknet21
cspnext_tiny
davit_tiny
deepseek_vit_412m depth=2 img_size=224
deit_tiny_patch16_224
densenet121
densenetblur121d
dla46x_c
dpn48b
edgenext_xx_small
efficientformer_l1
efficientformerv2_s0
efficientnet_lite0
efficientnetv2_rw_t
fbnetc_100
gc_efficientnetv2_rw_t
mixnet_s
mnasnet_small
mobilenet_edgetpu_100
mobilenetv2_035
semnasnet_050
spnasnet_100
tf_mixnet_s
tinynet_e
efficientvim_m1
efficientvit_b0
efficientvit_m0
eva02_tiny_patch14_224
vit_tiny_patch16_dinov3_qkvb
fasternet_t0
fastvit_t8
focalnet_tiny_srf
gcvit_xxtiny
gemma4_vit_167m depth=2
ghostnet_050
ghostnetv3_050
hardcorenas_b
hgnet_tiny
hgnetv2_b0
hiera_tiny_224
hieradet_small
sam2_hiera_tiny
hrnet_w18_small
iformer_t
inception_next_atto
inception_resnet_v2
inception_v3
inception_v4
lcnetv2_small
levit_128s
lowformer_b0
mambaout_femto
coatnet_pico_rw_224
coatnext_nano_rw_224
maxvit_pico_rw_256
maxxvit_rmlp_nano_rw_256
maxxvitv2_nano_rw_256
caformer_s18
convformer_s18
poolformer_s12
poolformerv2_s12
gmixer_12_224
gmlp_ti16_224
mixer_s16_224
resmlp_12_224
fbnetv3_b
lcnet_035
mobilenetv3_small_050
tf_mobilenetv3_small_075
mobilenetv5_base
mobilevit_xxs
mobilevitv2_050
mvitv2_tiny
naflexvit_base_patch16_parfac_gap depth=4
nasnetalarge
nest_tiny
nextvit_small
dm_nfnet_f0
eca_nfnet_l0
nf_regnet_b0
nfnet_l0
pit_ti_224
pnasnet5large
pvt_v2_b0
qwen3_vit_88m depth=4
rdnet_tiny
regnetv_040
regnetx_002
regnety_002
regnetz_005
repghostnet_050
repvit_m1
res2next50
resnest14d
ecaresnet26t
ecaresnetlight
ecaresnext26t_32x4d
resnet10t
resnetaa34d
resnetblur18
resnetrs50
resnext50_32x4d
senet154
seresnet18
seresnetaa50d
seresnext26t_32x4d
seresnextaa101d_32x8d
wide_resnet50_2
resnetv2_18
rexnet_100
rexnetr_100
selecsls42
legacy_seresnet18
sequencer2d_s
shvit_s1
skresnet18
skresnext50_32x4d
starnet_s050
swiftformer_xs
swin_tiny_patch4_window7_224
swinv2_tiny_window16_256
swinv2_cr_tiny_224
tiny_vit_5m_224
tnt_s_legacy_patch16_224
tresnet_m
twins_svt_small
vgg11
visformer_tiny
aimv2_large_patch14_224 depth=4
beit3_base_patch16_224 depth=4
eva_large_patch14_196 depth=4
flexivit_small
vit_tiny_patch16_224
vit_tiny_r_s16_p8_224
vit_srelpos_small_patch16_224
samvit_base_patch16_224 depth=6
vitamin_small_224
volo_d1_224
eca_vovnet39b
ese_vovnet19b_slim_dw
vovnet39a
legacy_xception
xception41p
xcit_nano_12_p8_224
""".strip().splitlines()

# transformers' classifiers, backbones and dense models, as `zoo` configures them.
TRANSFORMERS = """
ViTForImageClassification
DeiTForImageClassification
ViTMSNForImageClassification
BeitForImageClassification
Data2VecVisionForImageClassification
Dinov2ForImageClassification
Dinov2WithRegistersForImageClassification
DINOv3ViTBackbone
DINOv3ConvNextBackbone
VitDetBackbone
SwinForImageClassification
Swinv2ForImageClassification
ConvNextForImageClassification
ConvNextV2ForImageClassification
ResNetForImageClassification
RegNetForImageClassification
PvtForImageClassification
PvtV2ForImageClassification
SegformerForImageClassification
MobileViTForImageClassification
MobileViTV2ForImageClassification
MobileNetV1ForImageClassification
MobileNetV2ForImageClassification
LevitForImageClassification
HieraForImageClassification
FocalNetForImageClassification
EfficientNetForImageClassification
PoolFormerForImageClassification
CvtForImageClassification
BitForImageClassification
HGNetV2ForImageClassification
SwiftFormerForImageClassification
TextNetForImageClassification
PPLCNetForImageClassification
SegformerForSemanticSegmentation
MobileViTForSemanticSegmentation
MobileNetV2ForSemanticSegmentation
BeitForSemanticSegmentation
DPTForDepthEstimation
DPTForSemanticSegmentation
DepthAnythingForDepthEstimation
GLPNForDepthEstimation
UperNetForSemanticSegmentation
MaskFormerForInstanceSegmentation
Mask2FormerForUniversalSegmentation
DetrForObjectDetection
ConditionalDetrForObjectDetection
TableTransformerForObjectDetection
DeformableDetrForObjectDetection
RTDetrForObjectDetection
RTDetrV2ForObjectDetection
DFineForObjectDetection
YolosForObjectDetection
VideoMAEForVideoClassification
TimesformerForVideoClassification
ASTForAudioClassification
""".split()

TORCHVISION = """
alexnet convnext_tiny deeplabv3_mobilenet_v3_large deeplabv3_resnet50 densenet121 efficientnet_b0 efficientnet_v2_s
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcn_resnet50 fcos_resnet50_fpn
googlenet inception_v3 keypointrcnn_resnet50_fpn lraspp_mobilenet_v3_large maskrcnn_resnet50_fpn maxvit_t mc3_18 mnasnet0_5
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small mvit_v1_b mvit_v2_s quantized_googlenet quantized_inception_v3
quantized_mobilenet_v2 quantized_mobilenet_v3_large quantized_resnet18 quantized_shufflenet_v2_x0_5 r2plus1d_18 r3d_18
regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d retinanet_resnet50_fpn s3d shufflenet_v2_x0_5 squeezenet1_1
ssd300_vgg16 ssdlite320_mobilenet_v3_large swin3d_t swin_t swin_v2_t vgg11 vgg11_bn vit_b_32 wide_resnet50_2
""".split()

DECODERS = "Unet UnetPlusPlus FPN PAN PSPNet Linknet MAnet DeepLabV3 DeepLabV3Plus UPerNet Segformer".split()
WITHOUT_MIT = "UnetPlusPlus Linknet DeepLabV3 DeepLabV3Plus PAN".split()  # refused by the library
ENCODERS = "resnet18 resnet34 efficientnet-b0 timm-efficientnet-b1 mit_b0 mit_b1".split()

ULTRALYTICS = """
yolov8n yolov8s yolo11n yolo11s rtdetr-l yolov8n-seg yolo11n-seg yolov8n-pose yolo11n-pose yolov8n-cls yolo11n-cls
yolov8n-obb yolov5n yolov9t yolov10n yolo12n yolo26n yolov3-tiny rtdetr-resnet50
""".split()

MONAI = """
UNet
UNet dims=3
AttentionUnet
BasicUNet
SegResNet
SegResNet dims=3
SegResNetDS
DynUNet
DynUNet dims=3
VNet dims=3
UNETR dims=3
SwinUNETR dims=3
DenseNet121
DenseNet121 dims=3
SEResNet50
EfficientNetBN
FlexibleUNet channels=3
MedNeXt
ViT
resnet18
resnet18 dims=3
""".strip().splitlines()

OPEN_CLIP = "RN50 ViT-S-32 ViT-M-32-alt convnext_tiny MobileCLIP-S1".split()

STAGES = [
    *(f"timm:{name}" for name in TIMM),
    *(f"transformers:{name}" for name in TRANSFORMERS),
    *(f"torchvision:{name}" for name in TORCHVISION),
    *(
        f"smp:{name} encoder={encoder}"
        for name in DECODERS
        for encoder in ENCODERS
        if not (encoder.startswith("mit") and name in WITHOUT_MIT)
    ),
    *(f"ultralytics:{name}" for name in ULTRALYTICS),
    *(f"monai:{name}" for name in MONAI),
    *(f"open_clip:{name}" for name in OPEN_CLIP),
]

# Pairs that people distil, "teacher -> student @ size of both".
PAIRS = """
timm:resnet50 -> timm:resnet18 @ 96
timm:resnet101 -> timm:resnet34 @ 96
timm:resnet34 -> timm:resnet10t @ 96
timm:resnext50_32x4d -> timm:resnet18 @ 96
timm:seresnet50 -> timm:seresnet18 @ 96
timm:skresnet34 -> timm:skresnet18 @ 96
timm:ecaresnet50d -> timm:ecaresnet26t @ 96
timm:resnetv2_50 -> timm:resnetv2_18 @ 96
timm:res2net50_26w_4s -> timm:res2net50_14w_8s @ 96
timm:resnest26d -> timm:resnest14d @ 96
timm:resnetrs101 -> timm:resnetrs50 @ 96
timm:mobilenetv2_140 -> timm:mobilenetv2_035 @ 96
timm:mobilenetv3_large_100 -> timm:mobilenetv3_small_050 @ 96
timm:mobilenetv4_conv_medium -> timm:mobilenetv4_conv_small @ 96
timm:mobilenetv4_hybrid_medium -> timm:mobilenetv4_conv_small @ 128
timm:efficientnet_b2 -> timm:efficientnet_b0 @ 96
timm:efficientnetv2_rw_s -> timm:efficientnetv2_rw_t @ 96
timm:tf_efficientnetv2_b2 -> timm:tf_efficientnetv2_b0 @ 96
timm:efficientnet_lite2 -> timm:efficientnet_lite0 @ 96
timm:mnasnet_100 -> timm:mnasnet_small @ 96
timm:mixnet_l -> timm:mixnet_s @ 96
timm:tinynet_a -> timm:tinynet_e @ 96
timm:fbnetv3_d -> timm:fbnetv3_b @ 96
timm:lcnet_100 -> timm:lcnet_035 @ 96
timm:lcnetv2_base -> timm:lcnetv2_small @ 96
timm:ghostnet_130 -> timm:ghostnet_050 @ 96
timm:ghostnetv2_130 -> timm:ghostnetv2_100 @ 96
timm:ghostnetv3_100 -> timm:ghostnetv3_050 @ 96
timm:repghostnet_100 -> timm:repghostnet_050 @ 96
timm:regnetx_016 -> timm:regnetx_002 @ 96
timm:regnety_016 -> timm:regnety_002 @ 96
timm:regnetz_d8 -> timm:regnetz_b16 @ 96
timm:densenet169 -> timm:densenet121 @ 96
timm:dla60 -> timm:dla46_c @ 96
timm:dpn68 -> timm:dpn48b @ 96
timm:darknet53 -> timm:darknet17 @ 96
timm:cspdarknet53 -> timm:cs3darknet_focus_s @ 128
timm:cspresnet50 -> timm:cspresnet50d @ 96
timm:cspnext_s -> timm:cspnext_tiny @ 96
timm:hgnet_small -> timm:hgnet_tiny @ 96
timm:hgnetv2_b2 -> timm:hgnetv2_b0 @ 96
timm:vovnet57a -> timm:vovnet39a @ 96
timm:ese_vovnet39b -> timm:ese_vovnet19b_slim_dw @ 96
timm:selecsls60 -> timm:selecsls42 @ 128
timm:rexnet_150 -> timm:rexnet_100 @ 96
timm:repvgg_a2 -> timm:repvgg_a0 @ 96
timm:mobileone_s3 -> timm:mobileone_s1 @ 96
timm:repvit_m2 -> timm:repvit_m1 @ 96
timm:fasternet_t2 -> timm:fasternet_t0 @ 96
timm:starnet_s3 -> timm:starnet_s050 @ 96
timm:convnext_small -> timm:convnext_atto @ 96
timm:convnextv2_nano -> timm:convnextv2_atto @ 96
timm:inception_next_tiny -> timm:inception_next_atto @ 96
timm:rdnet_small -> timm:rdnet_tiny @ 96
timm:hrnet_w18 -> timm:hrnet_w18_small @ 96
timm:nf_resnet50 -> timm:nf_regnet_b0 @ 96
timm:xception65 -> timm:xception41 @ 128
timm:hardcorenas_f -> timm:hardcorenas_b @ 96
timm:mambaout_kobe -> timm:mambaout_femto @ 128
timm:tresnet_l -> timm:tresnet_m @ 128
timm:gernet_m -> timm:gernet_s @ 96
timm:vgg16_bn -> timm:vgg11_bn num_classes=0 @ 96
timm:resnet50 -> timm:mobilenetv2_100 @ 96
timm:resnet50 -> timm:mobilenetv3_small_100 @ 96
timm:resnet50 -> timm:efficientnet_b0 @ 96
timm:resnet50 -> timm:shvit_s1 @ 224
timm:resnet50 -> timm:ghostnet_100 @ 96
timm:resnet50 -> timm:repvgg_a0 @ 96
timm:resnet50 -> timm:regnety_002 @ 96
timm:resnet50 -> timm:convnext_atto @ 96
timm:resnet50 -> timm:mobilevit_xxs @ 128
timm:resnet50 -> timm:fastvit_t8 @ 128
timm:resnet101 -> timm:mobilenetv4_conv_small @ 96
timm:resnet34 -> timm:darknet17 @ 96
timm:regnety_032 -> timm:resnet18 @ 96
timm:regnety_160 depth=18 -> timm:resnet18 @ 96
timm:efficientnet_b3 -> timm:resnet18 @ 96
timm:efficientnet_b3 -> timm:mobilenetv2_050 @ 96
timm:efficientnetv2_rw_s -> timm:mobilenetv3_large_100 @ 96
timm:convnext_tiny -> timm:resnet18 @ 96
timm:convnext_tiny -> timm:mobilenetv2_100 @ 96
timm:convnext_tiny -> timm:efficientnet_b0 @ 96
timm:convnextv2_tiny -> timm:mobilenetv4_conv_small @ 96
timm:densenet121 -> timm:resnet18 @ 96
timm:densenet121 -> timm:mobilenetv2_100 @ 96
timm:hrnet_w18 -> timm:resnet18 @ 96
timm:hgnetv2_b4 -> timm:mobilenetv3_large_100 @ 96
timm:darknet53 -> timm:resnet18 @ 96
timm:vovnet39a -> timm:mobilenetv2_100 @ 96
timm:inception_v3 -> timm:resnet18 @ 299
timm:inception_v4 -> timm:mobilenetv2_100 @ 299
timm:xception41 -> timm:resnet18 @ 128
timm:vgg16_bn -> timm:resnet18 @ 96
timm:vgg13_bn -> timm:mobilenetv2_100 @ 96
timm:dla60 -> timm:resnet18 @ 96
timm:wide_resnet50_2 -> timm:resnet18 @ 96
timm:resnext50_32x4d -> timm:mobilenetv2_100 @ 96
timm:seresnet50 -> timm:mobilenetv3_small_050 @ 96
timm:repvit_m1 -> timm:mobilenetv2_050 @ 96
timm:nfnet_l0 -> timm:resnet18 @ 96
timm:gernet_s -> timm:mobilenetv3_small_100 @ 96
timm:rexnet_100 -> timm:lcnet_050 @ 96
timm:tf_efficientnetv2_b0 -> timm:mobilenetv2_050 @ 96
timm:pnasnet5large -> timm:resnet18 @ 331
timm:vit_base_patch16_224 depth=12 -> timm:vit_tiny_patch16_224 @ 64
timm:vit_small_patch16_224 -> timm:vit_tiny_patch16_224 @ 64
timm:vit_large_patch16_224 depth=8 -> timm:vit_small_patch16_224 @ 64
timm:deit_base_patch16_224 depth=6 -> timm:deit_tiny_patch16_224 @ 64
timm:deit_small_distilled_patch16_224 -> timm:deit_tiny_distilled_patch16_224 @ 64
timm:deit3_small_patch16_224 -> timm:deit_tiny_patch16_224 @ 64
timm:vit_small_patch14_dinov2 -> timm:vit_tiny_patch16_224 @ 112
timm:vit_small_patch14_reg4_dinov2 -> timm:vit_tiny_patch16_224 @ 112
timm:vit_small_patch16_dinov3 -> timm:vit_tiny_patch16_224 @ 64
timm:eva02_small_patch14_224 -> timm:eva02_tiny_patch14_224 @ 112
timm:beit_base_patch16_224 depth=4 -> timm:vit_tiny_patch16_224 @ 64
timm:vit_base_patch16_clip_224 depth=4 -> timm:vit_tiny_patch16_224 @ 64
timm:vit_base_patch16_siglip_224 depth=4 -> timm:vit_small_patch16_224 @ 64
timm:vit_relpos_medium_patch16_224 -> timm:vit_relpos_small_patch16_224 @ 64
timm:cait_xs24_384 -> timm:cait_xxs24_224 @ 96
timm:xcit_small_12_p16_224 -> timm:xcit_tiny_12_p16_224 @ 64
timm:xcit_tiny_12_p16_224 -> timm:deit_tiny_patch16_224 @ 64
timm:convit_small -> timm:convit_tiny @ 64
timm:vit_small_r26_s32_224 -> timm:vit_tiny_r_s16_p8_224 @ 64
timm:mixer_b16_224 -> timm:mixer_s16_224 @ 64
timm:gmlp_s16_224 -> timm:gmlp_ti16_224 @ 64
timm:resmlp_24_224 -> timm:resmlp_12_224 @ 64
timm:flexivit_base depth=4 -> timm:flexivit_small @ 96
timm:samvit_base_patch16_224 depth=4 -> timm:vit_tiny_patch16_224 @ 64
timm:naflexvit_base_patch16_gap depth=4 -> timm:vit_tiny_patch16_224 @ 64
timm:tnt_b_patch16_224 -> timm:tnt_s_patch16_224 @ 64
timm:crossvit_small_240 -> timm:crossvit_tiny_240 @ 240
timm:crossvit_small_240 -> timm:vit_tiny_patch16_224 @ 240
timm:volo_d2_224 -> timm:volo_d1_224 @ 224
timm:vit_small_patch16_224 -> timm:resnet18 @ 64
timm:vit_small_patch16_224 -> timm:mobilenetv2_100 @ 64
timm:vit_small_patch16_224 -> timm:efficientnet_b0 @ 64
timm:vit_small_patch16_224 -> timm:convnext_atto @ 64
timm:deit_small_patch16_224 -> timm:mobilenetv3_small_100 @ 64
timm:vit_small_patch14_dinov2 -> timm:resnet18 @ 112
timm:vit_small_patch14_reg4_dinov2 -> timm:mobilenetv2_100 @ 112
timm:vit_small_patch16_dinov3 -> timm:convnext_atto @ 64
timm:vit_base_patch16_clip_224 depth=4 -> timm:resnet18 @ 64
timm:vit_base_patch32_224 depth=4 -> timm:resnet18 @ 96
timm:eva02_small_patch14_224 -> timm:mobilenetv3_large_100 @ 112
timm:beit_base_patch16_224 depth=4 -> timm:resnet34 @ 64
timm:mixer_b16_224 -> timm:resnet18 @ 64
timm:volo_d1_224 -> timm:resnet18 @ 224
timm:nest_tiny -> timm:resnet18 @ 224
timm:sequencer2d_s -> timm:resnet18 @ 224
timm:vitamin_small_224 -> timm:resnet18 @ 224
timm:xcit_tiny_12_p16_224 -> timm:resnet18 @ 64
timm:cait_xxs24_224 -> timm:resnet18 @ 64
timm:resnet50 -> timm:vit_tiny_patch16_224 @ 64
timm:resnet50 -> timm:deit_tiny_patch16_224 @ 64
timm:regnety_032 -> timm:deit_tiny_distilled_patch16_224 @ 64
timm:convnext_tiny -> timm:vit_tiny_patch16_224 @ 64
timm:efficientnet_b3 -> timm:deit_tiny_patch16_224 @ 64
timm:swin_small_patch4_window7_224 -> timm:swin_tiny_patch4_window7_224
timm:swinv2_tiny_window8_256 -> timm:resnet18 @ 256
timm:swinv2_cr_small_224 -> timm:swinv2_cr_tiny_224
timm:swin_tiny_patch4_window7_224 -> timm:resnet18
timm:swin_tiny_patch4_window7_224 -> timm:mobilenetv2_100
timm:swin_tiny_patch4_window7_224 -> timm:efficientnet_b0
timm:swin_tiny_patch4_window7_224 -> timm:convnext_atto
timm:swin_tiny_patch4_window7_224 -> timm:deit_tiny_patch16_224
timm:vit_small_patch16_224 -> timm:swin_tiny_patch4_window7_224
timm:resnet50 -> timm:swin_tiny_patch4_window7_224
timm:convnext_tiny -> timm:swin_tiny_patch4_window7_224
timm:pvt_v2_b2 -> timm:pvt_v2_b0 @ 64
timm:pvt_v2_b2 -> timm:resnet18 @ 64
timm:resnet50 -> timm:pvt_v2_b0 @ 64
timm:twins_svt_base -> timm:twins_svt_small @ 224
timm:twins_svt_small -> timm:resnet18 @ 224
timm:davit_tiny -> timm:resnet18 @ 224
timm:gcvit_tiny -> timm:gcvit_xxtiny @ 224
timm:gcvit_xxtiny -> timm:resnet18 @ 224
timm:mvitv2_small -> timm:mvitv2_tiny @ 224
timm:mvitv2_tiny -> timm:resnet18 @ 224
timm:hiera_tiny_224 -> timm:resnet18 @ 224
timm:hiera_small_224 -> timm:hiera_tiny_224 @ 224
timm:focalnet_tiny_srf -> timm:resnet18 @ 224
timm:coatnet_nano_rw_224 -> timm:coatnet_pico_rw_224 @ 224
timm:coatnet_nano_rw_224 -> timm:resnet18 @ 224
timm:maxvit_nano_rw_256 -> timm:maxvit_pico_rw_256 @ 256
timm:maxvit_pico_rw_256 -> timm:resnet18 @ 256
timm:coat_mini -> timm:coat_tiny @ 224
timm:coat_tiny -> timm:resnet18 @ 224
timm:edgenext_small -> timm:edgenext_xx_small @ 128
timm:edgenext_small -> timm:mobilenetv3_small_100 @ 128
timm:efficientformer_l3 -> timm:efficientformer_l1 @ 224
timm:efficientformerv2_s1 -> timm:efficientformerv2_s0 @ 224
timm:efficientvit_b1 -> timm:efficientvit_b0 @ 128
timm:efficientvit_m4 -> timm:efficientvit_m0 @ 224
timm:efficientvim_m2 -> timm:efficientvim_m1 @ 224
timm:resnet50 -> timm:efficientvit_m0 @ 224
timm:resnet50 -> timm:efficientvit_b0 @ 96
timm:levit_256 -> timm:levit_128s @ 224
timm:resnet50 -> timm:levit_128s @ 224
timm:levit_256 -> timm:resnet18 @ 224
timm:regnety_032 -> timm:levit_128s @ 224
timm:tiny_vit_11m_224 -> timm:tiny_vit_5m_224 @ 224
timm:tiny_vit_5m_224 -> timm:mobilenetv3_small_100 @ 224
timm:swin_tiny_patch4_window7_224 -> timm:tiny_vit_5m_224 @ 224
timm:fastvit_sa12 -> timm:fastvit_t8 @ 128
timm:mobilevit_s -> timm:mobilevit_xxs @ 128
timm:mobilevitv2_100 -> timm:mobilevitv2_050 @ 128
timm:mobilevit_s -> timm:mobilenetv2_100 @ 128
timm:nextvit_small -> timm:resnet18 @ 224
timm:poolformer_s24 -> timm:poolformer_s12 @ 64
timm:poolformer_s12 -> timm:resnet18 @ 64
timm:caformer_s18 -> timm:resnet18 @ 96
timm:convformer_s18 -> timm:mobilenetv2_100 @ 96
timm:pit_s_224 -> timm:pit_ti_224 @ 224
timm:visformer_small -> timm:visformer_tiny @ 224
timm:visformer_tiny -> timm:resnet18 @ 224
timm:swiftformer_s -> timm:swiftformer_xs @ 224
timm:lowformer_b1 -> timm:lowformer_b0 @ 224
timm:cpubone_b0_bfrobust -> timm:cpubone_nano @ 224
timm:shvit_s2 -> timm:shvit_s1 @ 224
timm:iformer_s -> timm:iformer_t @ 224
timm:botnet26t_256 -> timm:resnet18 @ 256
timm:halonet26t -> timm:resnet18 @ 256
timm:bat_resnext26ts -> timm:resnet18 @ 256
timm:lambda_resnet26t -> timm:resnet18 @ 256
timm:inception_next_tiny -> timm:mobilenetv3_small_100 @ 96
transformers:ViTForImageClassification hidden_size=128 -> transformers:ViTForImageClassification
transformers:ViTForImageClassification num_hidden_layers=12 -> transformers:DeiTForImageClassification
transformers:DeiTForImageClassification hidden_size=128 -> transformers:DeiTForImageClassification
transformers:BeitForImageClassification hidden_size=128 -> transformers:ViTForImageClassification
transformers:Dinov2ForImageClassification hidden_size=128 -> transformers:Dinov2ForImageClassification
transformers:Dinov2WithRegistersForImageClassification hidden_size=128 -> transformers:Dinov2ForImageClassification
transformers:Dinov2WithRegistersForImageClassification -> transformers:ResNetForImageClassification @ 70
transformers:ViTForImageClassification -> transformers:ResNetForImageClassification
transformers:ResNetForImageClassification hidden_sizes=[64,128,256,512] -> transformers:ResNetForImageClassification
transformers:ResNetForImageClassification -> transformers:ViTForImageClassification
transformers:ResNetForImageClassification -> transformers:MobileNetV2ForImageClassification
transformers:ResNetForImageClassification -> transformers:RegNetForImageClassification
transformers:RegNetForImageClassification -> transformers:ResNetForImageClassification
transformers:ConvNextForImageClassification hidden_sizes=[32,64,128,256] -> transformers:ConvNextForImageClassification
transformers:ConvNextV2ForImageClassification -> transformers:ResNetForImageClassification
transformers:SwinForImageClassification embed_dim=48 -> transformers:SwinForImageClassification
transformers:Swinv2ForImageClassification embed_dim=48 -> transformers:Swinv2ForImageClassification
transformers:SwinForImageClassification -> transformers:ResNetForImageClassification @ 224
transformers:SwinForImageClassification -> transformers:ConvNextForImageClassification @ 224
transformers:SegformerForImageClassification -> transformers:ResNetForImageClassification
transformers:SegformerForImageClassification hidden_sizes=[64,128,320,512] -> transformers:SegformerForImageClassification
transformers:PvtForImageClassification -> transformers:ResNetForImageClassification
transformers:PvtV2ForImageClassification hidden_sizes=[64,128,320,512] -> transformers:PvtV2ForImageClassification
transformers:MobileViTForImageClassification -> transformers:MobileNetV2ForImageClassification @ 128
transformers:MobileViTV2ForImageClassification -> transformers:MobileViTV2ForImageClassification width_multiplier=0.5
transformers:LevitForImageClassification -> transformers:LevitForImageClassification hidden_sizes=[64,128,192]
transformers:ResNetForImageClassification -> transformers:LevitForImageClassification @ 224
transformers:HieraForImageClassification embed_dim=48 -> transformers:HieraForImageClassification
transformers:HieraForImageClassification -> transformers:ResNetForImageClassification @ 224
transformers:FocalNetForImageClassification -> transformers:ResNetForImageClassification @ 224
transformers:PoolFormerForImageClassification -> transformers:ResNetForImageClassification
transformers:CvtForImageClassification -> transformers:ResNetForImageClassification
transformers:EfficientNetForImageClassification -> transformers:MobileNetV2ForImageClassification
transformers:Data2VecVisionForImageClassification hidden_size=128 -> transformers:Data2VecVisionForImageClassification
transformers:DINOv3ViTBackbone -> transformers:ViTForImageClassification
transformers:DINOv3ConvNextBackbone -> transformers:ConvNextForImageClassification
transformers:SegformerForSemanticSegmentation hidden_sizes=[64,128,320,512] -> transformers:SegformerForSemanticSegmentation
transformers:SegformerForSemanticSegmentation -> transformers:MobileViTForSemanticSegmentation @ 128
transformers:UperNetForSemanticSegmentation -> transformers:SegformerForSemanticSegmentation
transformers:SegformerForSemanticSegmentation -> transformers:UperNetForSemanticSegmentation
transformers:BeitForSemanticSegmentation -> transformers:SegformerForSemanticSegmentation
transformers:MobileNetV2ForSemanticSegmentation -> transformers:MobileNetV2ForSemanticSegmentation depth_multiplier=0.5
transformers:DPTForDepthEstimation hidden_size=128 -> transformers:DPTForDepthEstimation
transformers:DPTForSemanticSegmentation -> transformers:SegformerForSemanticSegmentation
transformers:DepthAnythingForDepthEstimation -> transformers:DepthAnythingForDepthEstimation
transformers:DepthAnythingForDepthEstimation -> transformers:GLPNForDepthEstimation @ 224
transformers:GLPNForDepthEstimation hidden_sizes=[64,128,320,512] -> transformers:GLPNForDepthEstimation
transformers:MaskFormerForInstanceSegmentation -> transformers:MaskFormerForInstanceSegmentation
transformers:Mask2FormerForUniversalSegmentation -> transformers:Mask2FormerForUniversalSegmentation
transformers:Mask2FormerForUniversalSegmentation -> transformers:SegformerForSemanticSegmentation
transformers:DetrForObjectDetection -> transformers:DetrForObjectDetection
transformers:DetrForObjectDetection -> transformers:YolosForObjectDetection
transformers:ConditionalDetrForObjectDetection -> transformers:ConditionalDetrForObjectDetection
transformers:ConditionalDetrForObjectDetection -> transformers:DetrForObjectDetection
transformers:DeformableDetrForObjectDetection -> transformers:DeformableDetrForObjectDetection
transformers:DeformableDetrForObjectDetection -> transformers:DetrForObjectDetection
transformers:RTDetrForObjectDetection -> transformers:RTDetrForObjectDetection
transformers:RTDetrV2ForObjectDetection -> transformers:RTDetrForObjectDetection
transformers:RTDetrV2ForObjectDetection -> transformers:DFineForObjectDetection
transformers:DFineForObjectDetection -> transformers:DFineForObjectDetection
transformers:YolosForObjectDetection hidden_size=128 -> transformers:YolosForObjectDetection
transformers:VideoMAEForVideoClassification hidden_size=128 -> transformers:VideoMAEForVideoClassification
transformers:TimesformerForVideoClassification hidden_size=128 -> transformers:TimesformerForVideoClassification
transformers:ASTForAudioClassification hidden_size=128 -> transformers:ASTForAudioClassification
transformers:Wav2Vec2ForSequenceClassification hidden_size=128 -> transformers:Wav2Vec2ForSequenceClassification
smp:Unet encoder=resnet34 -> smp:Unet encoder=resnet18
smp:Unet encoder=resnet34 -> smp:FPN encoder=resnet18
smp:Unet encoder=resnet34 -> smp:Unet encoder=efficientnet-b0
smp:Unet encoder=mit_b1 -> smp:Unet encoder=mit_b0
smp:Unet encoder=mit_b1 -> smp:Unet encoder=resnet18
smp:Unet encoder=resnet50 -> smp:Linknet encoder=resnet18
smp:UnetPlusPlus encoder=resnet34 -> smp:Unet encoder=resnet18
smp:UnetPlusPlus encoder=resnet34 -> smp:UnetPlusPlus encoder=resnet18
smp:FPN encoder=resnet50 -> smp:FPN encoder=resnet18
smp:FPN encoder=resnet34 -> smp:FPN encoder=mobilenet_v2
smp:FPN encoder=efficientnet-b1 -> smp:FPN encoder=efficientnet-b0
smp:PAN encoder=resnet34 -> smp:PAN encoder=resnet18
smp:PSPNet encoder=resnet34 -> smp:PSPNet encoder=resnet18
smp:PSPNet encoder=resnet50 -> smp:Unet encoder=mobilenet_v2
smp:Linknet encoder=resnet34 -> smp:Linknet encoder=resnet18
smp:MAnet encoder=resnet34 -> smp:MAnet encoder=resnet18
smp:MAnet encoder=mit_b1 -> smp:Unet encoder=mit_b0
smp:DeepLabV3 encoder=resnet50 -> smp:DeepLabV3 encoder=mobilenet_v2
smp:DeepLabV3Plus encoder=resnet50 -> smp:DeepLabV3Plus encoder=resnet18
smp:DeepLabV3Plus encoder=resnet50 -> smp:DeepLabV3Plus encoder=mobilenet_v2
smp:DeepLabV3Plus encoder=resnet34 -> smp:Unet encoder=resnet18
smp:UPerNet encoder=resnet34 -> smp:UPerNet encoder=resnet18
smp:UPerNet encoder=mit_b1 -> smp:UPerNet encoder=mit_b0
smp:UPerNet encoder=mit_b1 -> smp:Unet encoder=resnet18
smp:Segformer encoder=mit_b1 -> smp:Segformer encoder=mit_b0
smp:Segformer encoder=resnet34 -> smp:Segformer encoder=resnet18
smp:Segformer encoder=mit_b1 -> smp:FPN encoder=resnet18
smp:Unet encoder=tu-convnext_atto -> smp:Unet encoder=resnet18
smp:Unet encoder=densenet121 -> smp:Unet encoder=tu-mobilenetv3_small_100
torchvision:resnet50 -> torchvision:resnet18 @ 96
torchvision:resnet50 -> torchvision:mobilenet_v2 @ 96
torchvision:resnet50 -> torchvision:mobilenet_v3_small @ 96
torchvision:resnet50 -> torchvision:shufflenet_v2_x0_5 @ 96
torchvision:resnet50 -> torchvision:squeezenet1_1 @ 128
torchvision:resnet50 -> torchvision:quantized_resnet18 @ 96
torchvision:resnet50 -> torchvision:quantized_mobilenet_v3_large @ 96
torchvision:wide_resnet50_2 -> torchvision:resnet18 @ 96
torchvision:densenet169 -> torchvision:densenet121 @ 96
torchvision:efficientnet_b1 -> torchvision:efficientnet_b0 @ 96
torchvision:efficientnet_v2_s -> torchvision:mobilenet_v3_large @ 96
torchvision:regnet_y_1_6gf -> torchvision:regnet_y_400mf @ 96
torchvision:mnasnet1_0 -> torchvision:mnasnet0_5 @ 96
torchvision:googlenet -> torchvision:resnet18 @ 128
torchvision:vgg13_bn -> torchvision:vgg11 @ 64
torchvision:convnext_tiny -> torchvision:resnet18 @ 96
torchvision:swin_s -> torchvision:swin_t @ 96
torchvision:swin_v2_t -> torchvision:resnet18 @ 96
torchvision:swin_t -> torchvision:mobilenet_v3_large @ 96
torchvision:maxvit_t -> torchvision:resnet18 @ 224
torchvision:vit_b_16 -> torchvision:resnet18 @ 64
torchvision:vit_b_32 -> torchvision:mobilenet_v2 @ 96
torchvision:fcn_resnet50 -> torchvision:fcn_resnet50 @ 64
torchvision:fcn_resnet50 -> torchvision:lraspp_mobilenet_v3_large @ 64
torchvision:deeplabv3_resnet50 -> torchvision:deeplabv3_mobilenet_v3_large @ 64
torchvision:deeplabv3_resnet50 -> torchvision:lraspp_mobilenet_v3_large @ 64
torchvision:fasterrcnn_resnet50_fpn -> torchvision:fasterrcnn_mobilenet_v3_large_fpn @ 128
torchvision:fasterrcnn_resnet50_fpn -> torchvision:fasterrcnn_resnet50_fpn trainable_backbone_layers=3 @ 128
torchvision:retinanet_resnet50_fpn -> torchvision:retinanet_resnet50_fpn @ 128
torchvision:fcos_resnet50_fpn -> torchvision:fcos_resnet50_fpn @ 128
torchvision:ssd300_vgg16 -> torchvision:ssdlite320_mobilenet_v3_large @ 300
torchvision:r3d_18 -> torchvision:mc3_18 @ 48
torchvision:r2plus1d_18 -> torchvision:mc3_18 @ 48
torchvision:r3d_18 -> torchvision:r2plus1d_18 @ 48
torchvision:swin3d_t -> torchvision:r3d_18 @ 64
torchvision:swin3d_s -> torchvision:swin3d_t @ 64
torchvision:mvit_v1_b -> torchvision:r3d_18 @ 224
torchvision:s3d -> torchvision:r3d_18 @ 224
ultralytics:yolov8s -> ultralytics:yolov8n
ultralytics:yolov8m -> ultralytics:yolov8n
ultralytics:yolo11s -> ultralytics:yolo11n
ultralytics:yolov8s -> ultralytics:yolo11n
ultralytics:yolo12s -> ultralytics:yolo12n
ultralytics:yolov9s -> ultralytics:yolov9t
ultralytics:yolov10s -> ultralytics:yolov10n
ultralytics:yolo26s -> ultralytics:yolo26n
ultralytics:rtdetr-l -> ultralytics:yolov8n
ultralytics:rtdetr-l -> ultralytics:yolo11n
ultralytics:rtdetr-resnet50 -> ultralytics:rtdetr-l
ultralytics:yolov8s-seg -> ultralytics:yolov8n-seg
ultralytics:yolo11s-seg -> ultralytics:yolo11n-seg
ultralytics:yolov8s-pose -> ultralytics:yolov8n-pose
ultralytics:yolo11s-pose -> ultralytics:yolo11n-pose
ultralytics:yolov8s-cls -> ultralytics:yolov8n-cls
ultralytics:yolo11s-cls -> ultralytics:yolo11n-cls
ultralytics:yolov8s-obb -> ultralytics:yolov8n-obb
monai:UNet channels=1 -> monai:UNet num_res_units=0
monai:UNet dims=3 -> monai:UNet dims=3 num_res_units=0
monai:AttentionUnet -> monai:UNet
monai:BasicUNet -> monai:BasicUNet features=(4,4,8,16,32,4)
monai:SegResNet init_filters=16 -> monai:SegResNet
monai:SegResNet dims=3 init_filters=16 -> monai:SegResNet dims=3
monai:DynUNet filters=[16,32,64,128] -> monai:DynUNet
monai:DynUNet dims=3 -> monai:UNet dims=3
monai:SwinUNETR dims=3 feature_size=24 -> monai:SwinUNETR dims=3
monai:SwinUNETR dims=3 -> monai:SegResNet dims=3 @ 64
monai:SwinUNETR dims=3 -> monai:UNet dims=3 @ 64
monai:UNETR dims=3 -> monai:UNet dims=3
monai:VNet dims=3 -> monai:SegResNet dims=3
monai:DenseNet169 -> monai:DenseNet121
monai:DenseNet121 dims=3 -> monai:resnet18 dims=3
monai:resnet34 -> monai:resnet18
monai:resnet34 dims=3 -> monai:resnet18 dims=3
monai:resnet18 dims=3 -> monai:resnet10 dims=3
monai:ViT dims=3 -> monai:resnet18 dims=3
monai:SegResNetDS init_filters=16 -> monai:SegResNetDS
monai:MedNeXt -> monai:UNet
monai:FlexibleUNet channels=3 -> monai:UNet channels=3
open_clip:RN50 -> timm:resnet18 @ 224
open_clip:ViT-S-16 -> timm:vit_tiny_patch16_224 @ 64
open_clip:ViT-S-32 -> open_clip:ViT-M-32-alt @ 64
open_clip:ViT-S-32 -> timm:resnet18 @ 64
open_clip:convnext_tiny -> timm:convnext_atto @ 96
open_clip:MobileCLIP-S1 -> timm:mobilenetv3_small_100 @ 256
open_clip:ViT-S-32 whole=True -> open_clip:ViT-M-32-alt whole=True
timm:resnet50 -> transformers:ResNetForImageClassification @ 64
timm:vit_small_patch16_224 -> transformers:ViTForImageClassification @ 64
timm:convnext_tiny -> torchvision:mobilenet_v2 @ 96
transformers:SwinForImageClassification -> timm:resnet18 @ 224
transformers:Dinov2ForImageClassification -> timm:mobilenetv2_100 @ 70
torchvision:resnet50 -> timm:efficientnet_b0 @ 96
torchvision:fcn_resnet50 -> smp:Unet encoder=resnet18 @ 64
transformers:SegformerForSemanticSegmentation -> smp:Unet encoder=resnet18 @ 64
transformers:UperNetForSemanticSegmentation -> smp:FPN encoder=mobilenet_v2 @ 64
transformers:DepthAnythingForDepthEstimation -> smp:Unet encoder=resnet18 @ 224
ultralytics:yolov8s -> timm:resnet18 @ 128
timm:resnet50 -> ultralytics:yolov8n-cls @ 128
own:table net=resnet34 -> own:table net=resnet18
own:table net=resnet34 -> own:table net=mobilenetv2_100
own:streams net=resnet34 -> own:streams net=resnet18
own:siamese net=resnet34 -> own:siamese net=resnet18
own:siamese net=resnet34 -> own:siamese net=mobilenetv3_small_100
own:list net=resnet34 -> own:list net=resnet18
own:list net=resnet34 -> own:list net=mobilenetv2_100
own:sequence width=32 -> own:sequence
timm:resnet34 in_chans=1 -> timm:resnet18 in_chans=1 @ 64
lora of timm:vit_small_patch16_224 -> timm:vit_tiny_patch16_224 @ 64
timm:vit_small_patch16_224 -> lora of timm:vit_tiny_patch16_224 @ 64
timm:vit_small_patch16_224 -> lora of timm:deit_tiny_patch16_224 @ 64
transformers:ViTForImageClassification -> lora of transformers:ViTForImageClassification
timm:swin_tiny_patch4_window7_224 -> lora of timm:swin_tiny_patch4_window7_224
timm:resnet34 -> lora of timm:resnet18 @ 64
timm:resnet34 -> compiled of timm:resnet18 @ 64
compiled of timm:resnet34 -> timm:resnet18 @ 64
compiled of timm:vit_small_patch16_224 -> compiled of timm:vit_tiny_patch16_224 @ 64
parallel of timm:resnet34 -> parallel of timm:resnet18 @ 64
timm:vit_small_patch16_224 -> parallel of timm:vit_tiny_patch16_224 @ 64
bfloat16 of timm:resnet34 -> timm:resnet18 @ 64
bfloat16 of timm:vit_small_patch16_224 -> timm:resnet18 @ 64
bfloat16 of timm:vit_small_patch16_224 -> bfloat16 of timm:vit_tiny_patch16_224 @ 64
bfloat16 of transformers:Dinov2ForImageClassification -> timm:mobilenetv2_100 @ 70
""".strip().splitlines()

# Rows whose flags were looked at and are right as they are, with the reason.
_HRNET = "the last sums of its branches: most of the weights lead to them, nothing flows through any earlier value"
_XCEPTION = (
    "timm names values beside a shortcut; the block's end before them is tapped, and they lead to the next position"
)
_STRIDE_16 = "the teacher ends at stride 16, so its last blocks go with what is coarser in the student, by depth"
_HEAD = "the convolution before the pooling works on the map, as MobileNet's last does"
_FINER = (
    "the student's first stage is finer than any of the teacher's; its weights lead to the positions of the others"
)
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
    "pair timm:nest_tiny -> timm:resnet18 @ 224": _STRIDE_16,
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
