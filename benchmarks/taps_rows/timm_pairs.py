"""The pairs of two networks of timm."""

TIMM_PAIRS = """
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
""".strip().splitlines()
