"""Where weights come from, without a network: a stand-in for the hub."""

import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.pretrained import hub
from tests.extras import require


@pytest.mark.parametrize("prefix", ["", "hf:", "timm:", "openai:", "open_clip:", "big_vision:"])
def test_what_is_here_is_taken_from_here(tmp_path, prefix):
    (tmp_path / "w.npz").write_bytes(b"")
    assert hub.find(f"{prefix}{tmp_path / 'w.npz'}") == tmp_path / "w.npz"
    assert hub.find(f"{prefix}{tmp_path}") == tmp_path


@pytest.mark.parametrize(
    "init", ["nowhere", "/nowhere", "openai:nowhere.pt", "big_vision:x.npz", "hf:/nowhere", "hf:a.pt"]
)
def test_a_missing_path_is_named(init):
    with pytest.raises(UserError, match=r"no such file or folder: .*(nowhere|x\.npz|a\.pt)"):
        hub.find(init)


def test_an_unknown_prefix():
    with pytest.raises(UserError, match=r"init=s3:x is neither a path nor of the form hf:..., timm:..."):
        hub.find("s3:x")


def test_the_hub_is_asked_for_safetensors_first(tmp_path, monkeypatch):
    module = require("huggingface_hub")
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, "*.bin" in allow_patterns))
        if "*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert hub.find("timm:resnet50.a1_in1k") == tmp_path
    assert asked == [("timm/resnet50.a1_in1k", False), ("timm/resnet50.a1_in1k", True)]
    asked.clear()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hub.find("hf:openai/clip-vit-base-patch16") == tmp_path
    assert asked == [("openai/clip-vit-base-patch16", False)]


def test_without_a_network_it_says_what_to_do(monkeypatch):
    module = require("huggingface_hub")

    def fail(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(module, "snapshot_download", fail)
    with pytest.raises(
        UserError, match=r"hf:a/b: a/b cannot be downloaded .*Name or service not known.*download it"
    ):
        hub.find("hf:a/b")
    with pytest.raises(UserError, match=r"hf:a/b/c/d"):
        monkeypatch.undo()
        hub.find("hf:a/b/c/d")
