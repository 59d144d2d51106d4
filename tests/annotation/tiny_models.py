"""Tiny random models of each family of annotators, saved as Hugging Face saves them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.extras import require

WORDS = "a photo of question : what does the picture show ? answer is this red green blue ball kite grass sky".split()
LABELS = ["red ball", "grass", "sky"]


def words(special: Sequence[str], more: Sequence[str] = (), **options: Any) -> Any:
    """A tokeniser of whole words; the special ones come first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    listed = list(dict.fromkeys([*special, *more, *WORDS, ".", "<unk>"]))
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(listed)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = options.pop("start", None), options.pop("end", None)
    if start or end:
        places = [(t, listed.index(t)) for t in (start, end) if t]
        single = " ".join(filter(None, (start, "$A", end)))
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=places)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token=special[0], **options)


def save(folder: Path, model: Any, processor: Any) -> str:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def blip2(folder: Path) -> str:
    t = require("transformers")
    tokenizer = words(["<pad>", "</s>", "<image>"], bos_token="</s>", eos_token="</s>")
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = t.Blip2Config(
        vision_config=dict(vision, image_size=32, patch_size=16),
        qformer_config=dict(
            vision, vocab_size=8, encoder_hidden_size=16, cross_attention_frequency=1, max_position_embeddings=8
        ),
        text_config=t.OPTConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        ),
        num_query_tokens=2,
        image_token_index=2,
    )  # fmt: skip
    processor = t.Blip2Processor(t.BlipImageProcessor(size=dict(height=32, width=32)), tokenizer, 2)
    return save(folder, t.Blip2ForConditionalGeneration(config), processor)


def florence2(folder: Path) -> str:
    t = require("transformers")
    places = [f"<loc_{k}>" for k in range(1000)]
    tokenizer = words(
        ["<pad>", "<s>", "</s>", "<image>"], places, bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    config = t.Florence2Config(
        text_config=t.BartConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
            decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        ),
        vision_config=dict(
            embed_dim=[8, 8, 8, 16], depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 2], num_groups=[1, 1, 1, 2],
            window_size=2, projection_dim=16, max_temporal_embeddings=4, max_position_embeddings=8,
        ),
        image_token_id=3,
        projection_dim=16,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size=dict(height=64, width=64), do_center_crop=False)
    images.image_seq_length = 5
    processor = t.Florence2Processor(images, tokenizer, num_additional_image_tokens=0)
    return save(folder, t.Florence2ForConditionalGeneration(config), processor)


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


def qwen_vl(folder: Path) -> str:
    t = require("transformers")
    special = (
        "<pad> <|im_end|> <|im_start|> <|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>".split()
    )
    tokenizer = words(
        special, eos_token="<|im_end|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
        },
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:3]})
    config = t.Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
            rope_scaling=dict(rope_type="default", mrope_section=[2, 1, 1], mrope_interleaved=True),
            pad_token_id=0, eos_token_id=1,
        ),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=8, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=16, num_position_embeddings=16, deepstack_visual_indexes=[0],
        ),
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    images = t.Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, size=dict(shortest_edge=1024, longest_edge=4096)
    )
    video = t.Qwen3VLVideoProcessor(patch_size=8, merge_size=2)
    processor = t.Qwen3VLProcessor(images, tokenizer, video, chat_template=CHAT)
    return save(folder, t.Qwen3VLForConditionalGeneration(config), processor)


def detr_backbone() -> Any:
    t = require("transformers")
    return t.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def grounding_dino(folder: Path) -> str:
    t = require("transformers")
    tokenizer = words(
        ["[PAD]", "[CLS]", "[SEP]", "?"], start="[CLS]", end="[SEP]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = t.GroundingDinoConfig(
        backbone_config=detr_backbone(),
        text_config=dict(
            model_type="bert", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=6, max_text_len=11, num_feature_levels=4,
    )  # fmt: skip
    images = t.GroundingDinoImageProcessor(size=dict(shortest_edge=64, longest_edge=96))
    return save(
        folder, t.GroundingDinoForObjectDetection(config), t.GroundingDinoProcessor(images, tokenizer)
    )


def owlv2(folder: Path) -> str:
    t = require("transformers")
    tokenizer = words(["!", "<s>", "</s>"], start="<s>", end="</s>", model_max_length=16)
    one = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = t.Owlv2Config(
        text_config=dict(one, vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=2),
        vision_config=dict(one, image_size=32, patch_size=8),
        projection_dim=16,
    )
    images = t.Owlv2ImageProcessor(size=dict(height=32, width=32))
    return save(folder, t.Owlv2ForObjectDetection(config), t.Owlv2Processor(images, tokenizer))


def rt_detr(folder: Path) -> str:
    t = require("transformers")
    config = t.RTDetrV2Config(
        backbone_config=t.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=[8, 8, 8], encoder_hidden_dim=16, encoder_ffn_dim=16, encoder_attention_heads=2,
        d_model=16, decoder_in_channels=[16, 16, 16], decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=16,
        num_queries=6, num_denoising=0, id2label=dict(enumerate(LABELS)), label2id={k: i for i, k in enumerate(LABELS)},
    )  # fmt: skip
    images = t.RTDetrImageProcessor(size=dict(height=64, width=64))
    return save(folder, t.RTDetrV2ForObjectDetection(config), images)


def sam(folder: Path) -> str:
    t = require("transformers")
    config = t.SamConfig(
        vision_config=dict(
            hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64,
            patch_size=16, mlp_dim=16, global_attn_indexes=[0], window_size=2, num_pos_feats=8,
        ),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                 iou_head_hidden_dim=16),
    )  # fmt: skip
    images = t.SamImageProcessor(size=dict(longest_edge=64), pad_size=dict(height=64, width=64))
    return save(folder, t.SamModel(config), t.SamProcessor(images))


def mask_parts() -> dict[str, Any]:
    return dict(
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                 iou_head_hidden_dim=16),
    )  # fmt: skip


def sam2(folder: Path) -> str:
    t = require("transformers")
    config = t.Sam2Config(
        vision_config=dict(
            backbone_config=dict(
                model_type="sam2_hiera_det_model", hidden_size=8, num_attention_heads=1, image_size=[64, 64],
                blocks_per_stage=[1, 1, 1, 1], embed_dim_per_stage=[8, 16, 32, 64],
                num_attention_heads_per_stage=[1, 1, 1, 1], window_size_per_stage=[8, 4, 4, 2],
                global_attention_blocks=[],
                window_positional_embedding_background_size=[2, 2],
            ),
            backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=16, num_feature_levels=3,
        ),
        **mask_parts(),
    )  # fmt: skip
    images = t.Sam2ImageProcessor(size=dict(height=64, width=64))
    return save(folder, t.Sam2Model(config), t.Sam2Processor(images))


def sam3(folder: Path) -> str:
    t = require("transformers")
    config = t.Sam3TrackerConfig(
        vision_config=dict(
            backbone_config=dict(
                model_type="sam3_vit_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, image_size=64, patch_size=16, window_size=2, global_attn_indexes=[0],
                pretrain_image_size=64,
            ),
            fpn_hidden_size=16, backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        ),
        **mask_parts(),
    )  # fmt: skip
    images = t.Sam3ImageProcessor(size=dict(height=64, width=64))
    return save(folder, t.Sam3TrackerModel(config), t.Sam3TrackerProcessor(images))


def labelled() -> dict[str, Any]:
    return dict(id2label=dict(enumerate(LABELS)), label2id={k: i for i, k in enumerate(LABELS)})


def lean(layer: Any) -> None:
    """Makes a classifier prefer the second of `LABELS`: random weights would prefer no object."""
    layer.weight.data.zero_()
    layer.bias.data.zero_()
    layer.bias.data[1] = 4


def mask2former(folder: Path) -> str:
    t = require("transformers")
    backbone = detr_backbone()
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = t.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6, **labelled(),
    )  # fmt: skip
    images = t.Mask2FormerImageProcessor(size=dict(height=64, width=64))
    model = t.Mask2FormerForUniversalSegmentation(config)
    lean(model.class_predictor)
    return save(folder, model, images)


def oneformer(folder: Path) -> str:
    t = require("transformers")
    backbone = detr_backbone()
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    tokenizer = words(
        ["!", "<s>", "</s>"], ["the", "task", "panoptic"], start="<s>", end="</s>", model_max_length=77
    )
    config = t.OneFormerConfig(
        backbone_config=backbone, num_queries=6, conv_dim=32, mask_dim=32, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=16, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, query_dec_layers=1,
        text_encoder_width=16, text_encoder_num_layers=1, text_encoder_vocab_size=len(tokenizer), is_training=False,
        text_encoder_n_ctx=4, common_stride=4, **labelled(),
    )  # fmt: skip
    (folder).mkdir(exist_ok=True)
    import json

    names = {str(k): dict(name=name, isthing=int(k == 0)) for k, name in enumerate(LABELS)}
    (folder / "classes.json").write_text(json.dumps(names))
    images = t.OneFormerImageProcessor(
        size=dict(height=64, width=64), class_info_file="classes.json", repo_path=str(folder), num_text=4
    )
    model = t.OneFormerForUniversalSegmentation(config)
    lean(model.model.transformer_module.decoder.class_embed)
    return save(folder, model, t.OneFormerProcessor(images, tokenizer))


FAMILIES = dict(
    blip2=blip2, florence2=florence2, qwen_vl=qwen_vl, grounding_dino=grounding_dino, owlv2=owlv2, rt_detr=rt_detr,
    sam=sam, sam2=sam2, sam3=sam3, mask2former=mask2former, oneformer=oneformer,
)  # fmt: skip
