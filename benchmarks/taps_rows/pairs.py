"""The pairs whose taps are looked at, named as in `zoo.build`."""

from benchmarks.taps_rows.timm_pairs import TIMM_PAIRS

# Pairs that people distil, "teacher -> student @ size of both".
PAIRS = [
    *TIMM_PAIRS,
    *"""
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
""".strip().splitlines(),
]
