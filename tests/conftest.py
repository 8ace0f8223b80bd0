"""Fixtures that several test files share."""

import gc
import signal

import pytest
import torch
from components import TEXT_DIM, make_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_transformer
from loopback_hub import LoopbackHub
from matplotlib.figure import Figure
from PIL import Image
from tiny_runs import TINY, command_line, copy_source, reset_accelerate
from transformer_cases import CONFIGURATIONS

from freqgate_dit import VARIANTS, FreqGateDiTPipeline
from freqgate_dit.transformer_freqgate_dit import ConditionedDiTTransformer2DModel


# Tests run side by side (pytest-xdist), and threads that wait for a core of each other's make all of them slow.
torch.set_num_threads(1)


# They start processes, or measure a whole model. Begun last, one of them would keep one worker busy while the other
# has nothing left.
LONG = ("test_compare", "test_faults", "test_pushes", "test_train", "test_evaluation", "test_analyze")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish():
    gc.freeze()  # a run ends with a collection, which would look through all that was imported


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_process_state():
    threads = torch.get_num_threads()
    # Ignored where a shell has put pytest in the background, or under `nohup`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    reset_accelerate()
    yield
    reset_accelerate()
    torch.set_num_threads(threads)


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are saved with their size and nothing on them: rendering is more than half of a tiny run.

    A test that looks at one calls `monkeypatch.undo()` first.
    """

    def save(self, path):
        Image.new("RGB", tuple(self.bbox.size.astype(int))).save(path)

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(params=CONFIGURATIONS)
def model(request) -> ConditionedDiTTransformer2DModel:
    name, kwargs = CONFIGURATIONS[request.param]
    return tiny_transformer(name, **kwargs)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def options(tmp_path, cache):
    """Command line of a tiny run on the built-in data; keywords replace or add options, `None` leaves one out."""

    def build(**changes):
        return command_line({**TINY, "output_dir": tmp_path / "run", "cache_dir": cache, **changes})

    return build


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the source tree in which nothing was installed or built."""
    return copy_source(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of this test's own, to which this process is pointed; its user `ana` is logged in with write access."""
    with LoopbackHub() as hub:
        hub.add_user("ana", orgs=("lab",))
        hub.add_user("bob")
        hub.add_token("hf_ana_write", user="ana")
        hub.add_token("hf_ana_read", user="ana", role="read")
        hub.add_token("hf_bob_write", user="bob")
        hub.patched(monkeypatch, tmp_path / "hub_home", token="hf_ana_write")
        for waits in ("READ_WAITS", "WAITS"):
            monkeypatch.setattr(f"freqgate_dit.hub.{waits}", (0, 0, 0))
        yield hub


@pytest.fixture
def text_pipe(tmp_path) -> FreqGateDiTPipeline:
    return make_pipeline(
        tiny_transformer("cross_attention", num_classes=None, pooled_projection_dim=TEXT_DIM),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(tmp_path / "vocabulary"),
    )
