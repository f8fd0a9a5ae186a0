"""Pretrained weights: what is asked for is had or refused, quickly, and a wrong or damaged file never gets in."""
import http.server
import logging
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn

from aerial_nb.models import weights as chapter
from aerial_nb.models.weights import Source, WeightsError, fetch, match_weights, read_weights, start_encoder, to_bands

MOBILENET = Path(__file__).parents[1] / "../shared/data/encoders/mobilenet_v2_imagenet_torchvision_names.pth"
needs_mobilenet = pytest.mark.skipif(not MOBILENET.is_file(), reason="the weights of mobilenet_v2 are not here")
COMMIT = "0" * 40


def encoder(bands=3, width=8, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(bands, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3))


def equal(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- servers

class Hub(http.server.BaseHTTPRequestHandler):
    "As much of a hub as its client needs: files by path, and what was asked."
    files, asked, stalled = {}, [], False
    def log_message(self, *_): pass
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def answer(self, body: bool):
        type(self).asked.append(f"{self.command} {self.path}")
        if self.stalled: time.sleep(3)
        data = self.files.get(self.path)
        self.send_response(404 if data is None else 200)
        if data is None: self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"1234"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if body and data: self.wfile.write(data)


def hub_at(address: str, monkeypatch) -> None:
    "As HF_ENDPOINT would have said at the start."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub on this machine, and an empty cache."
    from huggingface_hub import constants
    class Mine(Hub): files, asked, stalled = {}, [], False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    Mine.address = f"http://127.0.0.1:{server.server_port}"
    for name in ("NO_PROXY", "no_proxy"): monkeypatch.setenv(name, "127.0.0.1,localhost")
    hub_at(Mine.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    yield Mine
    server.shutdown(); server.server_close()


def packed(model: nn.Module, folder: Path) -> bytes:
    save_file(model.state_dict(), folder / "packed.safetensors")
    return (folder / "packed.safetensors").read_bytes()


SOURCE = Source("small", "someone/small", ("model.safetensors", "pytorch_model.bin"))


def test_found_on_the_hub_then_in_the_cache_without_it(hub, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    hub.files["/someone/small/resolve/main/model.safetensors"] = packed(encoder(seed=7), tmp_path)
    mine = encoder()
    assert start_encoder(mine, "imagenet", SOURCE) == "imagenet (small)"
    assert equal(mine.state_dict(), encoder(seed=7).state_dict()) and "starts from imagenet (small)" in caplog.text
    asked = len(hub.asked)
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert start_encoder(encoder(), "auto", SOURCE) == "imagenet (small)" and len(hub.asked) == asked


def test_the_second_file_of_a_repository(hub, tmp_path):
    torch.save(encoder(seed=7).state_dict(), tmp_path / "a.bin")
    hub.files["/someone/small/resolve/main/pytorch_model.bin"] = (tmp_path / "a.bin").read_bytes()
    assert equal(read_weights(fetch(SOURCE)), encoder(seed=7).state_dict())


def test_not_on_the_hub(hub):
    with pytest.raises(WeightsError) as error: fetch(SOURCE)
    for said in ("encoder small", "model.safetensors or pytorch_model.bin of someone/small", "cache", hub.address, "no such file", "weights=''"):
        assert said in str(error.value)
    assert len(hub.asked) == 2


def test_offline_asks_nobody(hub, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE forbids"): fetch(SOURCE)
    assert hub.asked == []


def test_a_dead_network_is_found_out_in_seconds(hub, monkeypatch, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))                      # nobody listens there
        hub_at(f"http://127.0.0.1:{taken.getsockname()[1]}", monkeypatch)
        mine, begin = encoder(), time.monotonic()
        with pytest.raises(WeightsError, match="ConnectError|refused"): start_encoder(mine, "imagenet", SOURCE)
        assert start_encoder(mine, "auto", SOURCE) == ""
        assert time.monotonic() - begin < 4
    assert "RANDOM" in caplog.text and [r.levelname for r in caplog.records if "RANDOM" in r.message] == ["WARNING"]
    assert equal(mine.state_dict(), encoder().state_dict())


@pytest.mark.parametrize("source", [SOURCE, Source("small", url="{}/small.pth")], ids=["hub", "address"])
def test_a_server_that_says_nothing_is_left(hub, source):
    hub.stalled = True
    source = Source(source.encoder, source.repo, source.files, url=source.url.format(hub.address))
    begin = time.monotonic()
    with pytest.raises(WeightsError, match="no answer|[Tt]ime"): fetch(source, seconds=.3)
    assert time.monotonic() - begin < 2


def test_a_name_server_that_does_not_answer_is_left(hub, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3))
    begin = time.monotonic()
    with pytest.raises(WeightsError, match="no answer in 0.3 s"): fetch(Source("small", url="http://weights.invalid/small.pth"), seconds=.3)
    assert time.monotonic() - begin < 2


def test_an_address_is_kept_and_half_a_file_is_not(hub, tmp_path):
    torch.save(dict(model=encoder(seed=7).state_dict(), opt={}), tmp_path / "x.pth")
    hub.files["/x.pth"] = (tmp_path / "x.pth").read_bytes()
    source = Source("small", url=f"{hub.address}/x.pth")
    assert equal(read_weights(fetch(source)), encoder(seed=7).state_dict())
    assert fetch(source) == fetch(source) and len(hub.asked) == 1
    with pytest.raises(WeightsError, match="404"): fetch(Source("small", url=f"{hub.address}/none.pth"))
    assert [p.name for p in (tmp_path / "torch/checkpoints").iterdir()] == ["x.pth"]


def test_a_damaged_download_is_named(hub, tmp_path):
    hub.files["/someone/small/resolve/main/model.safetensors"] = packed(encoder(), tmp_path)[:-40]
    mine = encoder()
    with pytest.raises(WeightsError, match="model.safetensors is damaged.*delete it and fetch it again"): start_encoder(mine, "imagenet", SOURCE)
    with pytest.raises(WeightsError, match="damaged"): start_encoder(mine, "auto", SOURCE)   # no reason to start from something else
    assert equal(mine.state_dict(), encoder().state_dict())


# ---- files

class Somebodys:
    def __reduce__(self): return print, ("code ran",)


def test_damaged_and_foreign_files(tmp_path, capsys):
    torch.save(dict(x=Somebodys()), tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(dict(epoch=1), tmp_path / "empty.pth")
    torch.save(encoder().state_dict(), tmp_path / "good.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:700])
    (tmp_path / "nothing.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    for name, said in dict(code="refused", list="a list", empty="epoch", cut="damaged", nothing="damaged").items():
        with pytest.raises(WeightsError, match=f"{name}.pth.*{said}"): read_weights(tmp_path / f"{name}.pth")
    with pytest.raises(WeightsError, match="text.safetensors is damaged"): read_weights(tmp_path / "text.safetensors")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["imagnet", "nowhere/file.pth", "Imagenet"])
def test_neither_a_word_nor_a_file(name):
    with pytest.raises(WeightsError, match="did you mean|no such file"): start_encoder(encoder(), name, SOURCE)


def test_none_is_silent_and_nothing_is_said(caplog):
    caplog.set_level(logging.INFO)
    assert start_encoder(encoder(), None, SOURCE) == "" and not caplog.records
    assert start_encoder(encoder(), "", SOURCE) == "" and "random" in caplog.text


# ---- matching

@pytest.mark.parametrize("bands", [1, 4, 8])
def test_bands_are_adapted_and_said(tmp_path, bands, caplog):
    caplog.set_level(logging.INFO)
    torch.save(encoder(seed=7).state_dict(), tmp_path / "rgb.pth")
    mine = encoder(bands)
    assert start_encoder(mine, str(tmp_path / "rgb.pth"), SOURCE) == "rgb.pth"
    assert mine[0].in_channels == bands and f"0.weight adapted from 3 bands to {bands}" in caplog.text
    wide, rgb = mine[0].weight, encoder(seed=7)[0].weight
    assert all(torch.allclose(wide[:, i], rgb.sum(1) if bands == 1 else rgb[:, i % 3] * 3 / bands) for i in range(bands))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.integers(1, 4))
def test_bands_as_in_the_libraries(bands, k):
    from segmentation_models_pytorch.encoders._utils import patch_first_conv
    from timm.models import adapt_input_conv
    theirs = nn.Sequential(nn.Conv2d(3, 4, k))
    wide = to_bands(theirs[0].weight.detach().clone(), bands)
    assert wide.shape == (4, bands, k, k) and torch.allclose(wide, adapt_input_conv(bands, theirs[0].weight.detach()), atol=1e-6)
    if bands == 2: return   # SMP has twins of this function that differ there
    patch_first_conv(theirs, bands, pretrained=True)
    assert bands == 3 or torch.allclose(wide, theirs[0].weight, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "encoder.", "model.", "module.", "net.encoder.", "backbone."])
def test_prefixes_and_other_parts(prefix):
    theirs = {prefix + k: v for k, v in encoder(seed=7).state_dict().items()} | {"classifier.weight": torch.rand(2, 2), "decoder.0.weight": torch.rand(1)}
    found = match_weights(encoder().state_dict(), theirs)
    assert equal(found.state, encoder(seed=7).state_dict()) and not found.by_order
    assert set(found.left_out) == {"classifier.weight", "decoder.0.weight"}


def test_counters_may_be_missing():
    theirs = {k: v for k, v in encoder(seed=7).state_dict().items() if "num_batches" not in k}
    assert encoder().load_state_dict(match_weights(encoder().state_dict(), theirs).state)


def test_other_networks_are_refused():
    own, good = encoder().state_dict(), encoder(seed=7).state_dict()
    wrong = {"missing: 3.bias": {k: v for k, v in good.items() if k != "3.bias"},
             "too many: 3.scale": good | {"3.scale": torch.rand(4)},
             r"0.weight is \(9, 3, 3, 3\)": encoder(width=9).state_dict(),
             r"is \(8, 5, 3, 3\)": good | {"0.weight": torch.rand(8, 5, 3, 3)}}
    for said, theirs in wrong.items():
        with pytest.raises(WeightsError, match=f"odd.pth is not for this encoder.*{said}"): match_weights(own, theirs, "odd.pth")
    assert equal(own, encoder().state_dict())


def test_order_needs_every_shape_and_kind(caplog):
    own, good = encoder().state_dict(), encoder(seed=7).state_dict()
    renamed = {f"layer{i}.{k.rsplit('.', 1)[1]}": v for i, (k, v) in enumerate(good.items())}
    found = match_weights(own, renamed | {"head.weight": torch.rand(3, 4)})
    assert found.by_order and found.left_out == ("head.weight",) and equal(found.state, good)
    swapped = dict(reversed(renamed.items()))
    with pytest.raises(WeightsError, match="missing"): match_weights(own, swapped)
    other_kind = {k.replace("running_mean", "offset"): v for k, v in renamed.items()}
    with pytest.raises(WeightsError, match="missing"): match_weights(own, other_kind)


# ---- real networks

@needs_mobilenet
def test_mobilenet_in_two_libraries_says_the_same(caplog):
    from segmentation_models_pytorch.encoders import get_encoder
    own, theirs = get_encoder("mobilenet_v2"), get_encoder("tu-mobilenetv2_100")
    source = Source("mobilenet_v2")
    with caplog.at_level(logging.INFO):
        assert start_encoder(own, str(MOBILENET), source) == MOBILENET.name and "left out, the encoder has no such part: classifier.1.weight" in caplog.text
        assert "by order and shape" not in caplog.text
        assert start_encoder(theirs, str(MOBILENET), source) == MOBILENET.name and "matched by order and shape" in caplog.text
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): a, b = own.eval()(x), theirs.eval()(x)
    for i in range(5): assert torch.allclose(a[i], b[i], atol=1e-5), i
    assert a[4].std() > .1
    with pytest.raises(WeightsError, match="missing: conv1.weight"): start_encoder(get_encoder("resnet18"), str(MOBILENET), source)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_timms_own_names_fit_its_feature_extractors(name):
    import timm
    from segmentation_models_pytorch.encoders import get_encoder
    whole = timm.create_model(name)
    mine = get_encoder(f"tu-{name}")
    found = match_weights(mine.state_dict(), whole.state_dict())
    assert not found.by_order and all(k.split(".")[0] in ("fc", "head", "conv_head", "classifier") for k in found.left_out)
    nn.Module.load_state_dict(mine, found.state)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): last = whole.eval().forward_intermediates(x, intermediates_only=True)[-1]
    with torch.no_grad(): assert torch.allclose(mine.eval()(x)[-1], last, atol=1e-5)


def test_sources():
    known = chapter.smp_source("resnet34")
    assert known.repo == "smp-hub/resnet34.imagenet" and len(known.revision) == 40 and known.name == "imagenet (resnet34)"
    assert chapter.timm_source("resnet18", "tu-resnet18").name == "imagenet (tu-resnet18.a1_in1k)"
    assert chapter.timm_source("resnet18.a1_in1k").repo == "timm/resnet18.a1_in1k"
    with pytest.raises(WeightsError, match="has only imagenet"): fetch(chapter.smp_source("mobilenet_v2", "swsl"))
    with pytest.raises(WeightsError, match="timm has none"): fetch(chapter.timm_source("resnet18_nobody"))
