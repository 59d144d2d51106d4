"""CLIP without training as a segmenter: the ALIGN baselines of papers/004, 4.3 and figure 5, whose weights are private;
and CLIP, MaskCLIP and pseudo-masks + CLIP (B1) of papers/002, Tables 2 to 4.

  python -m ovseg_jax.main --config=configs/clip_dense.py
      on `scenes`, which is generated on the fly, on a laptop CPU in minutes: first a small CLIP is trained on single
      things, then tried on whole scenes. mIoU of one seed: 4.0 (stuff 26.2, chance 0.5), Grounding mIoU 38.2; with
      features=sclip 4.8 (31.5), clearclip 5.3 (33.3), activation 2.4 (13.6).
  python -m ovseg_jax.main --config=configs/clip_dense.py:data=sets,eval_sets=DIR
      CLIP's value features on the sets of figure 5; features=activation is the paper's class activation of the last
      map. ALIGN's mIoU on PC-459 is 3.6 with it, 4.8 with proposals (4.3, by differences).
  python -m ovseg_jax.main --config=configs/clip_dense.py:data=sets,eval_sets=DIR,towers=tipsv2_l14,protocol=tipsv2
      TIPSv2 by its own evaluation (google-deepmind/tips): published mIoU on A-150 24.7; B/14 17.4, So400m/14 23.3,
      g/14 17.8. CLIP B/16 with features=sclip,protocol=sclip: 16.45 (wangf3014/SCLIP).
  python -m ovseg_jax.main --config=configs/clip_dense.py:data=sets,eval_sets=DIR,features=proposals,proposals=WORKDIR
      the proposals of a run of configs/openseg.py, each named by CLIP's image tower ("ALIGN w/ proposal").
  python -m ovseg_jax.main --config=configs/clip_dense.py:data=sets,eval_sets=DIR,protocol=groupvit
      as papers/002 score CLIP and MaskCLIP (Tables 3 and 4), on VOC, Context and COCO-Object.
  python -m ovseg_jax.main --config=configs/clip_dense.py:features=pseudo_masks
      B1 of papers/002, 4.1, on `scenes`: each mask of the pseudo-mask generator is shown to CLIP on its own, the rest
      black. mIoU of one seed: 0.6 on seen pairs, 1.0 held out, 32.8 on stuff; with crop=True 5.9, 2.2 and 37.5. The
      value features of the same CLIP: 1.0, 0.1 and 26.2.
  python -m ovseg_jax.main --config=configs/tables/pseg.py:table=2,row=B1-pseudo-mask-CLIP,eval_sets=DIR
      B1 with DINO's tokens and CLIP ViT-L/14 on the sets. The paper's mIoU: 12.9, 3.9 and 2.9.

The run has no steps: its scores are in its summary. Everything that is not marked with a section is ours.
"""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common, pomp
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.tables import TABLE_2
from ovseg_jax.methods.published import PUBLISHED, towers_section

WINDOWED = ("tipsv2", "sclip", "clearclip")


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "sets"),
        # pseudo_masks: B1 of papers/002, 4.1, each pseudo-mask shown to CLIP on its own
        # sclip, clearclip: the last attention of these papers, see `ovseg_jax.models.transformer.Block`
        features=("value", "activation", "sclip", "clearclip", "proposals", "pseudo_masks"),
        # features=pseudo_masks: whether CLIP sees the box around a mask. False: the whole image, black outside of the
        # mask ("apply the current mask to the original image")
        crop=False,
        dino="hf:facebook/dino-vits8",  # features=pseudo_masks: where DINO's weights are (papers/002, C.1)
        proposals="",  # features=proposals: a run that proposes masks; on scenes one is trained by default
        eval_sets="",  # a folder that holds the sets by name, see configs/README.md
        # groupvit: as papers/002 score it, on VOC, Context and COCO-Object by sliding windows (`common.BACKGROUND`);
        # tipsv2, sclip, clearclip: by the windows of these (`ovseg_jax.decisions.published`), without background
        protocol=("plain", "groupvit", *WINDOWED),
        background=True,  # protocol=groupvit: whether background pixels are scored
        # of background: the cosine below which a pixel is background; papers/002 do not state theirs: ours
        threshold=0.2,
        sets="",  # by default those of figure 5, or of the protocol
        sets_are=("folders", "prepared"),
        towers="clip_vitb16",  # a model of `predict --model=list` except FC-CLIP, or another CLIP
        weights="",  # where they are, if not on the hub: a folder or file
        image_size=AtLeast(640, 1),  # 4.1; a multiple of the patch
        # of class names: imagenet | simple | vild | tcl, a template with {}, or FILE.json; by default the model's own,
        # for TIPSv2 tcl, as in its evaluation, for others imagenet
        prompt="",
        seed=0,
    )
    if args.data == "sets" and not args.prompt:
        args = args.changed(prompt=PUBLISHED[args.towers].prompt if args.towers in PUBLISHED else "imagenet")
    config = on_scenes(args) if args.data == "scenes" else on_sets(args)
    config.seed = args.seed
    args.check_read()
    return config


def without_steps(args: Args, towers: dict[str, Any], image_size: int, prompt: Any) -> ConfigDict:
    """Returns the run of a CLIP that is not trained."""
    # With proposals, dense features have no part in the scores.
    dense = dict(features="value" if args.features == "proposals" else args.features, prompt=prompt)
    more = {}
    if args.features == "pseudo_masks":
        dense |= dict(crop=args.crop, fill="zero")  # fill: ours, or mean, CLIP's mean pixel
        masks = common.colour_masks() if args.data == "scenes" else common.dino_masks(args.dino)
        more = dict(pseudo_masks=masks)
    return common.run(
        "clip_dense",
        steps=0,
        batch_size=8,
        towers=towers,
        dense=dense,
        **more,
        optimizer=common.adamw(1e-3, warmup_steps=0, weight_decay=0.0),
        data=dict(image_size=image_size, workers=0),
        checkpoint=common.checkpoint(every=0),
    )


def tested(config: ConfigDict, name: str, source: dict[str, Any], features: str, proposals: str) -> None:
    """Adds the evaluation on a source, by dense features or by the masks of the run `proposals`."""
    if features == "proposals":
        # Crops have the size that the tower knows.
        config.data.image_size = config.towers.image_size
        rules = dict(ensemble=0.0, fill="mean", batch_size=8)
        config.final_evals[name] = dict(type="transfer", source=source, proposals=proposals, **rules)
    else:
        config.final_evals[name] = common.segmentation(source, 8)


def on_scenes(args: Args) -> ConfigDict:
    """Returns a small CLIP with a ViT, learned from single things as that of configs/pomp.py, on whole scenes."""
    clip = pomp.small_clip(args.seed)
    vit = dict(patch=8, width=64, depth=2, heads=2, mlp_dim=128, grid=(4, 4), embed_dim=64, head_bias=False)
    clip.towers.image = dict(name="vit", pre_norm=True, **vit)
    clip.steps, clip.batch_size = 400, 128
    towers = dict(clip.towers.to_dict(), init="stage:clip", tokenizer="stage:clip")
    config = without_steps(args, towers, 64, "a photo of a {}")
    stages, proposals = dict(clip=clip), ""
    if args.features == "proposals":
        proposals = args.proposals or "stage:proposals"
        if not args.proposals:
            stages["proposals"] = pomp.proposals(args.seed)
    config.stages = common.train_stages(**stages)
    config.data.train = [common.scenes("train", 8)]  # only its classes are read
    tested(config, "test", common.scenes("test", 500), args.features, proposals)
    return config


def on_sets(args: Args) -> ConfigDict:
    """Returns published towers on the sets of figure 5, or others."""
    if not args.eval_sets:
        raise UserError("data=sets needs eval_sets=DIR, the folder of the sets")
    proposals = args.proposals if args.features == "proposals" else ""
    if args.features == "proposals" and not proposals:
        raise UserError("features=proposals needs proposals=WORKDIR, a run of configs/openseg.py")
    known = args.towers in PUBLISHED and not args.towers.startswith("fcclip")
    towers = towers_section(args.towers, args.weights) if known else pomp.published_towers(args)
    if args.protocol == "groupvit":
        return by_windows(args, towers)
    if args.protocol in WINDOWED and (proposals or args.features == "pseudo_masks"):
        raise UserError(f"protocol={args.protocol} is of dense features: leave out features={args.features}")
    if args.protocol in WINDOWED:
        size = 448  # that of the protocol replaces it
    else:
        size = towers["image_size"] if proposals else args.image_size
    config = without_steps(args, towers, size, args.prompt)
    form = (
        dict(name="prepared", split="val")
        if args.sets_are == "prepared"
        else dict(name="folder", kind="semantic")
    )
    sources = {
        name: dict(form, data_dir=f"{args.eval_sets}/{name}")
        for name in (args.sets or ";".join(TABLE_2[:4])).split(";")
    }
    config.data.train = [next(iter(sources.values()))]  # only its classes are read
    for name, source in sources.items():
        tested(config, name, source, args.features, proposals)
        if args.protocol in WINDOWED:
            config.final_evals[name].protocol = args.protocol
    return config


def by_windows(args: Args, towers: dict[str, Any]) -> ConfigDict:
    """Returns published towers on the sets of papers/002, by sliding windows."""
    if args.features == "proposals":
        raise UserError("protocol=groupvit has no proposals of a run: leave out features=proposals")
    config = without_steps(args, towers, 448, args.prompt)
    decision: dict[str, Any] = dict(type="argmax")
    if args.background:
        decision = dict(type="background_threshold", threshold=args.threshold)
    sets = args.sets or "VOC;Context;COCO-Object"
    rules = dict(decision=decision)
    config.final_evals = common.by_protocol(args.eval_sets, sets, args.sets_are, args.background, 8, **rules)
    config.data.train = [next(iter(config.final_evals.values())).source]  # only its classes are read
    return config
