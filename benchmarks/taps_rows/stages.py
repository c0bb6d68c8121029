"""The models whose stages are looked for, named as in `zoo.build`."""

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
