"""Features by any network, folders of images, and the features of a reference set that are computed once."""

import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from freqgate_dit import features as features_module
from freqgate_dit import references
from freqgate_dit.features import INCEPTION_FILE, Extractor, download_inception, extract_features, load_extractor
from freqgate_dit.image_folder import read_images
from freqgate_dit.metrics import FeatureStatistics
from freqgate_dit.references import ReferenceCache, load_reference, reference_statistics
from freqgate_dit.training.data import DataConfig, load_images


# A network as users write one: two of its functions take images, the other one makes such a function.
NETWORK = """
from pathlib import Path

import torch

class Net(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("kernel", 0.2 * torch.randn(5, 3, 3, 3, generator=generator))
        self.dropout = torch.nn.Dropout()

    def forward(self, images):
        x = torch.nn.functional.conv2d(images.float() / 127.5 - 1, self.kernel, stride=2)
        return self.dropout(x.relu().mean(dim=(2, 3)))

net = Net()

def colours(images):
    return images.float().mean(dim=(2, 3))

def load(device):
    return Net(SEED).to(device)

def stored(device):
    return Net(int(Path(__file__).with_name("weights.txt").read_text()))
"""
CPU = torch.device("cpu")


def batch(count=4, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def write_images(folder, count=10, side=16, suffix=".png", seed=0):
    """Images of noise, as files whose names have the order of the images; the images."""
    images = batch(count, side, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}{suffix}")
    return images


def extractor_of(function, name="test"):
    return Extractor(name, function, {}, CPU, torch.float32)


@pytest.fixture
def network(tmp_path):
    """Writes the network as a file, with weights of a seed, and gives its path."""

    def write(seed=0, name="my_net.py", more=""):
        path = tmp_path / name
        path.write_text(NETWORK.replace("SEED", str(seed)) + more)
        return path

    return write


# -- any network ------------------------------------------------------------------------------------------------------


def test_a_function_of_a_file(network):
    extractor = load_extractor(f"{network()}:colours")
    assert (extractor.name, extractor.width) == ("colours", None)
    images = batch()
    features = extractor(images)
    torch.testing.assert_close(features, images.float().mean(dim=(2, 3)), atol=1e-3, rtol=1e-6)
    assert features.dtype == torch.float32 and extractor.width == 3


def test_a_function_of_a_device_makes_the_network_and_its_module_gives_the_name(network):
    extractor = load_extractor(f"{network(seed=3)}:load", dtype="float32")
    assert extractor.name == "my_net"
    net = extractor.network
    assert not net.training  # dropout would make every call another
    torch.testing.assert_close(extractor(batch()), net(batch()))
    assert extractor.describe()["features_source"] == "my_net.py:load"


def test_a_function_or_a_network_of_a_module(network, monkeypatch):
    monkeypatch.syspath_prepend(network(name="some_features.py").parent)
    extractor = load_extractor("some_features:colours")
    assert (extractor.name, extractor.describe()["features_source"]) == ("colours", "some_features:colours")
    extractor = load_extractor("some_features:net", dtype="float32")
    assert extractor.name == "net" and torch.equal(extractor(batch()), extractor(batch()))


def test_features_are_those_of_any_batch_size_and_in_the_order_asked_for(network, tmp_path):
    write_images(tmp_path / "images", 11)
    images = read_images(tmp_path / "images")
    extractor = load_extractor(f"{network()}:load", dtype="float32")
    whole = extract_features(extractor, images, batch_size=11)
    assert whole.shape == (11, 5) and len(whole.unique(dim=0)) == 11
    for size in (1, 3, 64):
        torch.testing.assert_close(extract_features(extractor, images, batch_size=size), whole)
    chosen = [7, 0, 10, 3]
    torch.testing.assert_close(extract_features(extractor, images, chosen, batch_size=3), whole[chosen])


def test_precision_is_part_of_what_the_features_are(network):
    path = f"{network()}:load"
    full, half = (load_extractor(path, dtype=name) for name in ("float32", "bfloat16"))
    exact, rounded = full(batch()), half(batch())
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.03, atol=0.003)
    assert rounded.dtype == torch.float32 and half.describe()["features_precision"] == "bfloat16"
    assert full.fingerprint != half.fingerprint


def test_the_fingerprint_tells_weights_code_and_function_apart(network):
    path = network(seed=1)
    first = load_extractor(f"{path}:load").fingerprint
    assert load_extractor(f"{path}:load").fingerprint == first
    moved = path.parent / "elsewhere"
    moved.mkdir()
    shutil.copy(path, moved)
    assert load_extractor(f"{moved / path.name}:load").fingerprint == first
    extractor = load_extractor(f"{path}:load")
    others = {
        "weights": load_extractor(f"{network(seed=2)}:load").fingerprint,
        "code": load_extractor(f"{network(seed=1, more='# other code')}:load").fingerprint,
        "function": load_extractor(f"{path}:net").fingerprint,
        "name": Extractor("other", extractor.network, extractor.identity, CPU, extractor.dtype).fingerprint,
    }
    assert len({first, *others.values()}) == 5


def test_the_fingerprint_knows_weights_that_lie_in_a_file_of_their_own(network):
    path = network()
    fingerprints = []
    for seed in (1, 2, 1):
        path.with_name("weights.txt").write_text(str(seed))
        fingerprints.append(load_extractor(f"{path}:stored").fingerprint)
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def test_a_protocol_holds_no_folder_of_this_machine(network):
    path = network()
    described = load_extractor(f"{path}:load").describe()
    assert str(path.parent) not in json.dumps(described)
    assert all(isinstance(value, (str, int, type(None))) for value in described.values())


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("dino", r"must be inception, module:function, or path/to/file.py:function"),
        ("my_net:", "must be inception, module:function"),
        ("no_such_module:load", "cannot be imported: No module named 'no_such_module'"),
        ("nowhere/net.py:load", "there is no file nowhere/net.py"),
        ("FILE:lood", "there is no function lood in"),
        ("FILE:torch", "there is no function torch in"),  # a module is none
        ("BROKEN:load", "cannot be imported: No module named 'not_installed'.* Install what is missing"),
    ],
)
def test_names_of_nothing_are_refused(features, message, network):
    features = features.replace("FILE", str(network()))
    features = features.replace("BROKEN", str(network(name="broken.py", more="import not_installed")))
    with pytest.raises(ValueError, match=r"`features` \(.*\):? " + message):
        load_extractor(features)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.float(), r"returned \(4, 3, 16, 16\) for 4 images: it must return one tensor \(4, D\)"),
        (lambda x: x[:3].float().mean(dim=(2, 3)), r"returned \(3, 3\) for 4 images"),
        (lambda x: [1.0] * len(x), "returned list for 4 images"),
        (lambda x: x[:, :, 0, 0] / torch.tensor([1, 1, 0, 1.0])[:, None] * 0, "NaN or infinity for 1 of 4 images, "),
        (lambda x: torch.full((len(x), 3), torch.inf), "NaN or infinity for 4 of 4 images, the first is number 0 "),
    ],
)
def test_features_that_are_none_are_refused(function, message):
    with pytest.raises(ValueError, match=r"`features` \(test\) .*" + message):
        extractor_of(function)(batch())


def test_another_width_in_a_later_batch_is_refused():
    extractor = extractor_of(lambda images: images.float().flatten(1)[:, : 10 + len(images)])
    assert extractor(batch(4)).shape == (4, 14)
    with pytest.raises(ValueError, match=r"returned 13 features per image, but 14 before"):
        extractor(batch(3))


@pytest.mark.parametrize("images", [batch().float(), batch()[0], batch()[:, :1]])
def test_what_is_no_batch_of_images_is_refused(images):
    with pytest.raises(ValueError, match=r"`images` .* must be uint8 \(N, 3, H, W\)"):
        extractor_of(lambda images: images)(images)


# -- Inception --------------------------------------------------------------------------------------------------------


class InceptionLike(torch.nn.Module):
    """What clean-fid asks of its TorchScript file: `layers`, to 2048 features of 299 x 299 pixels."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 16, 16), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(8)
        )

    def forward(self, x, return_features: bool = False):
        return self.layers(x)


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / INCEPTION_FILE
    torch.manual_seed(0)
    model = InceptionLike().eval()
    torch.jit.script(model).save(path)
    return path, model


def resized(image):
    """What clean-fid calls clean: each channel by Pillow's bicubic filter in floating point, then clipped."""
    channels = [Image.fromarray(channel.numpy().astype(np.float32)).resize((299, 299), 3) for channel in image]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
class TestInception:
    def test_resize_and_network_are_those_of_clean_fid(self, torchscript):
        pytest.importorskip("cleanfid")
        path, model = torchscript
        extractor = load_extractor(inception_path=path)
        images = batch(3, side=20)
        features = extractor(images)
        assert features.shape == (3, 2048) and extractor.precision == "float32"
        with torch.no_grad():
            expected = model.layers((torch.stack([resized(image) for image in images]) - 128) / 128).flatten(1)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        # An image of 299 px stays as it is.
        image = batch(1, side=299)
        with torch.no_grad():
            expected = model.layers((image.float() - 128) / 128).flatten(1)
        torch.testing.assert_close(extractor(image), expected, rtol=1e-4, atol=1e-5)

    def test_it_runs_in_bfloat16_on_request(self, torchscript):
        pytest.importorskip("cleanfid")
        full, half = (load_extractor(inception_path=torchscript[0], dtype=name) for name in ("auto", "bfloat16"))
        torch.testing.assert_close(half(batch()), full(batch()), rtol=0.05, atol=0.02)
        assert not torch.equal(half(batch()), full(batch()))

    def test_only_the_published_weights_have_the_plain_name(self, torchscript, monkeypatch):
        pytest.importorskip("cleanfid")
        path, _ = torchscript
        digest = features_module._file_digest(path)
        assert load_extractor(inception_path=path.parent).name == f"inception_clean_{digest[:8]}"
        monkeypatch.setattr(features_module, "INCEPTION_SHA256", digest)
        extractor = load_extractor(inception_path=path)
        assert extractor.name == "inception_clean"
        assert extractor.describe()["features_weights"] == digest

    def test_files_that_are_none_are_refused(self, torchscript, tmp_path):
        pytest.importorskip("cleanfid")
        for path in (tmp_path, tmp_path / "missing.pt", shutil.copy(torchscript[0], tmp_path / "other_name.pt")):
            with pytest.raises(ValueError, match=f"`inception_path` .* must be the file {INCEPTION_FILE}"):
                load_extractor(inception_path=path)
        (tmp_path / INCEPTION_FILE).write_text("not found")
        with pytest.raises(ValueError, match="does not hold Inception's weights"):
            load_extractor(inception_path=tmp_path)
        torch.jit.script(torch.nn.ReLU()).save(tmp_path / INCEPTION_FILE)
        with pytest.raises(ValueError, match="does not hold Inception's weights"):
            load_extractor(inception_path=tmp_path)

    def test_without_clean_fid_it_says_what_to_install(self, torchscript, monkeypatch):
        monkeypatch.setitem(sys.modules, "cleanfid", None)
        monkeypatch.delitem(sys.modules, "cleanfid.inception_torchscript", raising=False)
        with pytest.raises(ImportError, match="pip install clean-fid"):
            load_extractor(inception_path=torchscript[0])

    def test_the_path_is_refused_for_another_network(self, network, torchscript):
        with pytest.raises(ValueError, match="`inception_path` .* is for `features` inception"):
            load_extractor(f"{network()}:colours", inception_path=torchscript[0])


@pytest.fixture
def weights_server(monkeypatch):
    """A server of 127.0.0.1 from which the weights come: `content` is what it sends, `requests` counts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            self.send_response(200 if server.content else 404)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.content = 0, b"weights"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(features_module, "INCEPTION_URL", f"http://127.0.0.1:{server.server_port}/{INCEPTION_FILE}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_weights_are_downloaded_once_and_checked(weights_server, monkeypatch, tmp_path):
    with pytest.raises(ConnectionError, match=f"{INCEPTION_FILE} arrived damaged.*`inception_path`"):
        download_inception(tmp_path)
    assert list(tmp_path.rglob("*.*")) == []
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    path = download_inception(tmp_path)
    assert path == tmp_path / "inception" / INCEPTION_FILE and path.read_bytes() == b"weights"
    assert weights_server.requests == 2
    assert download_inception(tmp_path) == path
    assert weights_server.requests == 2 and list(path.parent.iterdir()) == [path]


def test_without_network_it_says_which_file_from_where_and_where_to(weights_server, monkeypatch, tmp_path):
    def refused():
        with pytest.raises(ConnectionError) as error:
            download_inception(tmp_path)
        for told in (INCEPTION_FILE, features_module.INCEPTION_URL, str(tmp_path / "inception"), "`inception_path`"):
            assert told in str(error.value)

    weights_server.content = b""
    refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused()
    assert weights_server.requests == 1  # none when offline
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(features_module, "INCEPTION_URL", "http://127.0.0.1:9/file.pt")  # nobody listens there
    refused()


# -- folders of images ------------------------------------------------------------------------------------------------


def test_a_folder_is_read_with_its_subfolders_by_name(tmp_path):
    first, second = write_images(tmp_path / "b", 3), write_images(tmp_path / "a" / "deep", 2, seed=1)
    loose = write_images(tmp_path, 1, suffix=".webp")
    (tmp_path / "samples.json").write_text("{}")
    write_images(tmp_path / ".cache", 1)
    images = read_images(tmp_path, resolution=16)
    assert images.names == ["000.webp", "a/deep/000.png", "a/deep/001.png", "b/000.png", "b/001.png", "b/002.png"]
    assert len(images) == 6 and images.resolution == 16
    assert torch.equal(images.images([3, 1, 5, 2]), torch.stack([first[0], second[0], first[2], second[1]]))
    assert images.images(range(6)).dtype == torch.uint8
    assert images.images([0]).shape == loose.shape


def test_grey_palette_transparency_and_orientation(tmp_path):
    pixels = batch(1)[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0]).save(tmp_path / "0_grey.png")
    Image.fromarray(np.dstack([pixels, np.zeros((16, 16), np.uint8)])).save(tmp_path / "1_clear.png")
    Image.fromarray(pixels).quantize(8).save(tmp_path / "2_palette.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "3_turned.png", exif=exif)
    grey, clear, palette, turned = read_images(tmp_path).images(range(4))
    assert torch.equal(grey, torch.from_numpy(pixels[..., 0]).expand(3, 16, 16))
    assert (clear == 255).all()  # white, as a browser shows it
    assert len(palette.flatten(1).T.unique(dim=0)) <= 8
    assert torch.equal(turned.permute(1, 2, 0), torch.from_numpy(pixels[::-1, ::-1].copy()))


def test_the_fingerprint_is_that_of_names_and_content(tmp_path):
    write_images(tmp_path / "a", 3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = read_images(tmp_path / "a").fingerprint
    assert read_images(tmp_path / "b").fingerprint == first
    (tmp_path / "b" / "002.png").rename(tmp_path / "b" / "003.png")
    assert read_images(tmp_path / "b").fingerprint != first
    shutil.copy(tmp_path / "a" / "001.png", tmp_path / "a" / "002.png")
    assert read_images(tmp_path / "a").fingerprint != first


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: b"not a picture", lambda data: b""])
def test_a_damaged_image_is_named(damage, tmp_path):
    write_images(tmp_path / "cats", 3)
    path = tmp_path / "cats" / "001.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cats/001.png cannot be read as an image \(.*remove or replace it"):
        read_images(tmp_path)


def test_an_image_that_is_damaged_later_is_named_too(tmp_path):
    write_images(tmp_path, 3)
    images = read_images(tmp_path)
    (tmp_path / "001.png").write_bytes(b"")
    with pytest.raises(ValueError, match="001.png cannot be read as an image"):
        images.images(range(3))


def test_all_images_must_be_squares_of_one_size(tmp_path):
    write_images(tmp_path, 3)
    Image.new("RGB", (20, 20)).save(tmp_path / "001.png")
    Image.new("RGB", (24, 24)).save(tmp_path / "002.png")
    with pytest.raises(ValueError, match="001.png has 20 x 20 pixels, but 000.png is 16 px wide"):
        read_images(tmp_path)
    with pytest.raises(ValueError, match="000.png has 16 x 16 pixels, but `resolution` is 20"):
        read_images(tmp_path, resolution=20)
    Image.new("RGB", (16, 20)).save(tmp_path / "000.png")
    with pytest.raises(ValueError, match="000.png has 16 x 20 pixels"):
        read_images(tmp_path)


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png .*8 bits per channel"):
        read_images(tmp_path)


def test_generated_jpegs_are_refused_whatever_their_name_is(tmp_path):
    write_images(tmp_path, 2)
    Image.new("RGB", (16, 16)).save(tmp_path / "002.png", format="JPEG")
    assert len(read_images(tmp_path)) == 3
    with pytest.raises(ValueError, match="002.png is a JPEG, whose compression artefacts"):
        read_images(tmp_path, refuse_jpeg=True)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`folder` \(.*missing\) is no folder"):
        read_images(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="holds no image that Pillow reads, but 1 .txt"):
        read_images(tmp_path)
    (tmp_path / "more").symlink_to(tmp_path / "not mounted")
    with pytest.raises(ValueError, match="more' is a link to nothing"):
        read_images(tmp_path)


def test_every_still_image_that_pillow_reads_counts(tmp_path):
    write_images(tmp_path, 2)
    Image.new("RGB", (16, 16)).save(tmp_path / "002.jp2")
    (tmp_path / "003.pdf").write_bytes(b"no image")
    assert read_images(tmp_path).names == ["000.png", "001.png", "002.jp2"]


# -- reference sets ---------------------------------------------------------------------------------------------------


class Counted:
    """A network that counts the images it has seen, and dies at the one after `last`."""

    def __init__(self, last=None, factor=1.0):
        self.seen, self.last, self.factor = 0, last, factor

    def __call__(self, images):
        self.seen += len(images)
        if self.last is not None and self.seen > self.last:
            raise KeyboardInterrupt
        return images.float()[:, :, :2, 0].flatten(1) * self.factor


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "SHARD_IMAGES", 4)
    write_images(tmp_path / "images", 10)
    return read_images(tmp_path / "images")


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_computed(images, tmp_path):
    (tmp_path / "file").touch()
    network = Counted()
    with pytest.raises(PermissionError, match=r"`cache_dir`: .*file.*`--cache_dir`"):
        reference_statistics(images, extractor_of(network), "train", tmp_path / "file")
    assert network.seen == 0


def test_a_reference_is_computed_once(images, tmp_path):
    network = Counted()
    extractor = extractor_of(network)
    reference = reference_statistics(images, extractor, "train", tmp_path)
    assert network.seen == 11  # and the first one to check what was read
    expected = extract_features(extractor, images)
    assert torch.equal(reference.features, expected) and reference.count == 10
    assert [len(shard) for shard in reference.shards] == [4, 4, 2]
    statistics, whole = reference.statistics(), FeatureStatistics.of(expected)
    torch.testing.assert_close(statistics.mean, whole.mean)
    torch.testing.assert_close(statistics.covariance, whole.covariance)

    network.seen = 0
    again = reference_statistics(images, extractor, "train", tmp_path)
    assert network.seen == 1 and torch.equal(again.features, expected)


def test_the_manifest_says_what_it_is_of_and_nothing_of_this_machine(images, tmp_path, network):
    extractor = load_extractor(f"{network()}:load")
    manifest = reference_statistics(images, extractor, "heldout", tmp_path).manifest
    assert (manifest["count"], manifest["resolution"], manifest["split"]) == (10, 16, "heldout")
    assert manifest["data"] == images.fingerprint and manifest["extractor"] == extractor.describe()
    assert manifest["extractor"]["features_width"] == 5 and manifest["versions"]["torch"]
    (path,) = tmp_path.glob("references/*/manifest.json")
    assert json.loads(path.read_text()) == manifest and str(tmp_path) not in path.read_text()


def test_other_images_networks_and_splits_have_their_own(images, tmp_path):
    extractor = extractor_of(Counted())
    write_images(tmp_path / "others", 10, seed=1)
    others = read_images(tmp_path / "others")
    half = Extractor("test", Counted(), {}, CPU, torch.bfloat16)
    caches = [
        ReferenceCache(images, extractor, "train", tmp_path),
        ReferenceCache(others, extractor, "train", tmp_path),
        ReferenceCache(images, extractor, "heldout", tmp_path),
        ReferenceCache(images, half, "train", tmp_path),
    ]
    assert len({cache.folder for cache in caches}) == 4


def test_interrupted_work_goes_on(images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ReferenceCache(images, extractor_of(Counted(last=6)), "train", tmp_path).extract(batch_size=2)
    network = Counted()
    cache = ReferenceCache(images, extractor_of(network), "train", tmp_path)
    assert cache.missing() == [1, 2]
    with pytest.raises(ValueError, match="is incomplete: it has no manifest.json"):
        cache.load()
    cache.extract(batch_size=2)
    assert network.seen == 6
    assert torch.equal(cache.load().features, extract_features(extractor_of(Counted()), images))
    assert not list(cache.folder.glob("*.tmp"))


def test_a_damaged_shard_is_computed_again(images, tmp_path):
    network = Counted()
    cache = ReferenceCache(images, extractor_of(network), "train", tmp_path)
    cache.extract()
    path = cache.folder / "features_00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"is damaged \(features_00001.safetensors\)"):
        load_reference(cache.folder, extractor_of(network), 16)
    network.seen = 0
    cache.extract()
    assert network.seen == 4 and path.read_bytes() == whole


def test_processes_share_the_work(images, tmp_path):
    networks = [Counted(), Counted()]
    caches = [ReferenceCache(images, extractor_of(network), "train", tmp_path) for network in networks]
    caches[1].extract(1, 2)
    assert caches[0].missing() == [0, 2]
    caches[0].extract(0, 2)
    assert [network.seen for network in networks] == [6, 4]
    expected = extract_features(extractor_of(Counted()), images)
    assert all(torch.equal(cache.load().features, expected) for cache in caches)


def test_what_does_not_fit_is_refused(images, tmp_path):
    cache = ReferenceCache(images, extractor_of(Counted()), "train", tmp_path)
    cache.extract()
    same = extractor_of(Counted())
    assert load_reference(cache.folder, same, 16, 10).count == 10
    half = Extractor("test", Counted(), {}, CPU, torch.bfloat16)
    weights = Extractor("test", Counted(), {"weights": "other"}, CPU, torch.float32)
    for extractor, resolution, count, message in (
        (extractor_of(Counted(), "dino"), 16, None, "has features by test in float32, not dino in float32"),
        (half, 16, None, "has features by test in float32, not test in bfloat16"),
        (weights, 16, None, "has features by test in float32, not with other weights or code"),
        (same, 32, None, "is of 16 px, but the images have 32"),
        (same, 16, 9, "is of 10 images, not 9"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reference(cache.folder, extractor, resolution, count)
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    (cache.folder / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    with pytest.raises(ValueError, match="has another format"):
        load_reference(cache.folder, same, 16)


def test_an_empty_reference_is_refused(images, tmp_path):
    _, heldout = load_images(DataConfig(dataset=str(images.root), resolution=16, heldout_fraction=0.0))
    with pytest.raises(ValueError, match=r"`split` \(heldout\) holds no image"):
        reference_statistics(heldout, extractor_of(Counted()), "heldout", tmp_path)


def test_weights_that_changed_unseen_are_noticed(images, tmp_path):
    reference_statistics(images, extractor_of(Counted()), "train", tmp_path)
    reference_statistics(images, extractor_of(Counted(factor=1.002)), "train", tmp_path)  # rounding
    with pytest.raises(ValueError, match=r"`features` \(test\) has changed since the reference in .* was made"):
        reference_statistics(images, extractor_of(Counted(factor=1.1)), "train", tmp_path)


def test_a_reference_goes_through_the_preprocessing_of_the_trainer(images, tmp_path):
    config = DataConfig(dataset=str(images.root), resolution=16, heldout_fraction=0.0)
    trained_on, _ = load_images(config)
    extractor = extractor_of(Counted())
    reference = reference_statistics(trained_on, extractor, "train", tmp_path)
    assert torch.equal(reference.features, extract_features(extractor, images))
    assert reference.manifest["data"] == trained_on.fingerprint
