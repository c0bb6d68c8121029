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

STAGES = [f"timm:{name}" for name in TIMM]

# Pairs that people distil, "teacher -> student".
PAIRS: list[str] = []

# Rows whose flags were looked at and are right as they are, with the reason.
REVIEWED: dict[str, str] = {}
