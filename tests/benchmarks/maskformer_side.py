"""transformers' MaskFormer or Mask2Former for `step.py`: from a config of ours, with our parameters and optimiser.

The loss is the same, but for the points at which Mask2Former's is computed, which each side draws for itself.
"""

import itertools
import sys
from types import ModuleType

import numpy as np

from ovseg_jax.models.swin import PRESETS
from ovseg_jax.train.optimizer import make_schedule


def build(config, classes: int):
    """transformers' model of the same sizes, in PyTorch's eager mode."""
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    import transformers

    model, stages = config.model, [f"stage{i}" for i in (1, 2, 3, 4)]
    if model.backbone.name == "resnet50":
        backbone = transformers.ResNetConfig(out_features=stages)
    else:
        sizes = PRESETS[model.backbone.name]
        backbone = transformers.SwinConfig(
            embed_dim=sizes["width"],
            depths=list(sizes["depths"]),
            num_heads=list(sizes["heads"]),
            window_size=7,
            drop_path_rate=0.0,
            out_features=stages,
        )
    if config.method == "mask2former":
        return transformers.Mask2FormerForUniversalSegmentation(
            transformers.Mask2FormerConfig(
                backbone_config=backbone,
                feature_size=model.width,
                mask_feature_size=model.mask_dim,
                hidden_dim=model.width,
                encoder_feedforward_dim=model.encoder_ffn,
                dim_feedforward=model.ffn,
                encoder_layers=model.encoder_layers,
                decoder_layers=model.layers + 1,
                num_attention_heads=model.heads,
                num_queries=model.num_queries,
                num_labels=classes,
                train_num_points=config.loss.points,
            )
        )
    decoder = transformers.DetrConfig(
        d_model=model.width,
        decoder_layers=model.layers,
        decoder_attention_heads=model.heads,
        decoder_ffn_dim=model.ffn,
        num_queries=model.num_queries,
        dropout=0.0,
    )
    return transformers.MaskFormerForInstanceSegmentation(
        transformers.MaskFormerConfig(
            backbone_config=backbone,
            decoder_config=decoder,
            fpn_feature_size=model.width,
            mask_feature_size=model.mask_dim,
            num_labels=classes,
        )
    )


def fill(theirs, method, ours) -> None:
    """Copies our parameters by path into transformers' model, by the inverse of the loader's renames."""
    import torch

    from ovseg_jax.pretrained.load import formats
    from ovseg_jax.pretrained.rename import rename

    (renames,) = (own for name, own in formats(method.model).items() if name.startswith("transformers'"))

    state = {name: x for name, x in theirs.state_dict().items() if x.is_floating_point()}
    ends = list(itertools.accumulate(x.numel() for x in state.values()))
    places = {
        name: np.arange(end - x.numel(), end).reshape(x.shape)
        for (name, x), end in zip(state.items(), ends, strict=True)
    }
    flat = torch.cat([x.detach().flatten() for x in state.values()]).numpy()
    for path, place in rename(places, renames).items():
        flat[place] = ours[path]
    for (name, x), end in zip(state.items(), ends, strict=True):
        state[name] = torch.from_numpy(flat[end - x.numel() : end]).reshape(x.shape)
    theirs.load_state_dict(state, strict=False)


def torch_side(config, folder, batches, device: str, compiled: bool, predict: bool):
    """`step(i) -> loss`: forward, matching by SciPy, backward, clipped AdamW; or inference, see step.py."""
    import torch

    from ovseg_jax.methods import build as build_method
    from ovseg_jax.vocab.classes import ClassList
    from ovseg_jax.vocab.words import WordList

    classes = ClassList.from_json((folder / "classes.json").read_text())
    method = build_method(config, WordList.load(folder / "words.json"), classes)
    net = build(config, len(classes))
    saved = np.load(folder / "params.npz")
    fill(net, method, {name: saved[name] for name in saved.files})
    net = net.to(device, memory_format=torch.channels_last)
    net.train(not predict)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # as norm="frozen"
    mean, std = (
        torch.tensor(x, device=device).reshape(3, 1, 1) for x in (config.model.mean, config.model.std)
    )
    trained = torch.tensor([k not in classes.withheld() for k in range(len(classes))] + [False])
    forward = torch.compile(net) if compiled else net

    def pixels(image):
        x = (image.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return x.contiguous(memory_format=torch.channels_last)

    def predicted(i: int):
        with torch.no_grad():
            out = forward(pixels(torch.from_numpy(batches[i]["image"]).to(device)))
        return out.masks_queries_logits.abs().mean()

    peak = lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None
    if predict:
        return predicted, peak, lambda: None

    def loss_of(batch):
        kinds, masks = batch["mask_classes"].long(), batch["masks"].float() / 255
        valid = batch["mask_valid"] & trained[kinds]
        own = range(len(kinds))
        return forward(
            pixels(batch["image"]),
            mask_labels=[masks[b][valid[b]] for b in own],
            class_labels=[kinds[b][valid[b]] for b in own],
        ).loss

    optimizer = config.optimizer
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0},
    ]
    rule = torch.optim.AdamW(groups, eps=1e-8, fused=True)
    schedule = make_schedule(optimizer, config.steps)
    rates = [float(schedule(t)) for t in range(len(batches) + 1)]
    count = itertools.count()

    def step(i: int):
        batch = {name: torch.from_numpy(x).to(device) for name, x in batches[i].items()}
        rate = rates[min(next(count), len(rates) - 1)]
        for group in rule.param_groups:
            group["lr"] = rate
        loss = loss_of(batch)
        rule.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, optimizer.clip_norm)
        rule.step()
        return loss.detach()

    return step, peak, lambda: None
