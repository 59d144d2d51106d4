"""Published weights of backbones: their locations, and the normalisation of their pixels."""

from typing import NamedTuple

from ovseg_jax.errors import UserError

Channels = tuple[float, float, float]


class Pixels(NamedTuple):
    """The mean and standard deviation for normalising pixels in [0, 1]."""

    mean: Channels
    std: Channels


IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision, EfficientNet, DINO, MAE, Swin
CLIP = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # OpenAI's clip.load
HALF = Pixels(
    (0.5,) * 3, (0.5,) * 3
)  # SigLIP; timm's EfficientNet-Lite, whose authors have 127/255 and 128/255
UNIT = Pixels((0.0,) * 3, (1.0,) * 3)  # TIPS: google-deepmind/tips, scenic/configs/tips_model_config.py
# That of the released OpenSeg demo, for networks trained from scratch; others need that of their weights.
CENTRED = Pixels((128 / 255,) * 3, (128 / 255,) * 3)

BACKBONES = {
    "efficientnet_b7": "timm:tf_efficientnet_b7.ns_jft_in1k",  # noisy student
    "efficientnet_lite0": "timm:tf_efficientnet_lite0.in1k",
    "resnet101": "timm:resnet101.tv_in1k",
    "resnet50": "timm:resnet50.tv_in1k",
    "swin_tiny": "timm:swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "timm:swin_small_patch4_window7_224.ms_in1k",
    "swin_base_384": "timm:swin_base_patch4_window12_384.ms_in22k",
    "swin_large_384": "timm:swin_large_patch4_window12_384.ms_in22k",
    "clip_rn50": "hf:timm/resnet50_clip.openai",
    "clip_convnext_base": "open_clip:laion/CLIP-convnext_base-laion400M-s13B-b51K",
    "clip_convnext_base_w": "open_clip:laion/CLIP-convnext_base_w-laion2B-s13B-b82K-augreg",
    "clip_convnext_base_w_320": "open_clip:laion/CLIP-convnext_base_w_320-laion_aesthetic-s13B-b82K-augreg",
    "clip_convnext_large_d": "open_clip:laion/CLIP-convnext_large_d.laion2B-s26B-b102K-augreg",
    "clip_convnext_large_d_320": "open_clip:laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    "clip_convnext_xxlarge": "open_clip:laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
    "clip_vitb32": "hf:openai/clip-vit-base-patch32",
    "clip_vitb16": "hf:openai/clip-vit-base-patch16",
    "clip_vitl14": "hf:openai/clip-vit-large-patch14",
    "clip_vitl14_336": "hf:openai/clip-vit-large-patch14-336",
    "openclip_vitb16": "open_clip:laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "openclip_vitl14": "open_clip:laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "openclip_vith14": "open_clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "eva02_clip_b16": "hf:timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k",
    "eva02_clip_l14": "hf:timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k",
    "eva02_clip_l14_336": "hf:timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k",
    "eva02_clip_e14": "hf:timm/eva02_enormous_patch14_clip_224.laion2b_s4b_b115k",
    "eva01_clip_g14": "hf:timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k",
    # SigLIP 2
    "siglip_vitb16": "hf:google/siglip2-base-patch16-224",
    "siglip_vitb16_512": "hf:google/siglip2-base-patch16-512",
    "siglip_vitl16_384": "hf:google/siglip2-large-patch16-384",
    "siglip_so400m14_384": "hf:google/siglip2-so400m-patch14-384",
    "tipsv2_b14": "hf:google/tipsv2-b14",
    "tipsv2_l14": "hf:google/tipsv2-l14",
    "tipsv2_so400m14": "hf:google/tipsv2-so400m14",
    "tipsv2_g14": "hf:google/tipsv2-g14",
    "dino_vits8": "hf:facebook/dino-vits8",
    "dino_vits16": "hf:facebook/dino-vits16",
    "mae_vitb16": "hf:facebook/vit-mae-base",
}


def weights_of(backbone: str) -> str:
    """Returns the location of the published weights of a backbone.

    Raises:
      UserError: no weights are known; the message lists the backbones that have some.
    """
    if backbone not in BACKBONES:
        raise UserError(
            f"no published weights are known for {backbone!r} (only for {', '.join(BACKBONES)}): "
            "give weights=FOLDER or weights=FILE"
        )
    return BACKBONES[backbone]


def pixels_of(backbone: str) -> Pixels:
    """Returns the normalisation of pixels for the pretrained weights of a backbone."""
    if backbone.startswith(("siglip", "efficientnet_lite")):
        return HALF
    if backbone.startswith("tipsv2"):
        return UNIT
    return CLIP if backbone.startswith(("clip_", "openclip_", "eva")) else IMAGENET
