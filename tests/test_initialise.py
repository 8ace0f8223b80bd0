"""Fine-tuning: what is taken from a source, what stays fresh, what is refused, and that the user is told."""

import itertools
import json
import re
import shutil
from functools import partial

import huggingface_hub
import pytest
import torch
from components import LABELS, TEXT_DIM, assert_same_tensors, euler, make_pipeline, tiny_transformer
from diffusers import DiTTransformer2DModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, command_line, metrics, refusal, state, train
from transformer_cases import inputs, tiny_dit
from transformer_cases import run as output

from freqgate_dit import VARIANTS
from freqgate_dit.convert import from_diffusers
from freqgate_dit.training.config import ModelConfig, ObjectiveConfig, parse_config
from freqgate_dit.training.initialise import CLASS_TABLE, HUB_FILES, PICKLED_FILES, initialise, read_source
from freqgate_dit.training.train import main


pytestmark = pytest.mark.usefixtures("unrendered")


NAMES = tuple(LABELS.values())
# Every tensor whose shape depends on the size of a patch or on the channels of the image.
INPUT, OUTPUT = {"patch_embed.weight"}, {"proj_out.weight", "proj_out.bias"}
# Of two blocks.
MLP = {
    f"transformer_blocks.{block}.ff.net.{name}"
    for block in (0, 1)
    for name in ("0.proj.weight", "0.proj.bias", "2.weight")
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "source"


def save_pipeline(folder, transformer=None, names=NAMES, **kwargs):
    transformer = transformer or tiny_transformer(num_classes=len(names))
    make_pipeline(transformer, id2label=dict(enumerate(names)), **kwargs).save_pretrained(folder)
    return transformer.state_dict()


def take(model, folder, names=NAMES) -> tuple[dict[str, torch.Tensor], str]:
    """Initialise `model` from `folder`; its weights before that, and what the user reads."""
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return fresh, initialise(model, read_source(str(folder)), names)


def assert_taken(model, fresh, given, but=()):
    """Every tensor is the source's, but those named, which are as fresh as before."""
    assert set(but) <= fresh.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in but else given[name].to(tensor)), name


def share(model, *names, rows=0) -> str:
    """Of the parameters: those named, and rows of the class table."""
    tensors = model.state_dict()
    count = sum(tensors[name].numel() for name in names) + rows * 32
    return f"{count / sum(tensor.numel() for tensor in tensors.values()):.1%} of the parameters"


# -- where it is read from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pipeline_of_the_same_model_is_taken_whole(variant, folder):
    given = save_pipeline(folder, tiny_transformer(variant, seed=1))
    model = tiny_transformer(variant, seed=2)
    _, told = take(model, folder)
    assert_same_tensors(model.state_dict(), given)
    assert told == (
        f"initialised from {folder}: 100.0% of the parameters\n"
        "  class table: the null row and 3 classes of the same name; 0 stay fresh"
    )
    assert read_source(str(folder)).prediction_type == "epsilon"


def test_a_pipeline_says_what_its_model_predicts(folder):
    save_pipeline(folder, scheduler=euler("trailing", prediction_type="v_prediction"))
    assert read_source(str(folder)).prediction_type == "v_prediction"


def test_a_model_folder_names_no_classes(folder):
    source = tiny_transformer(seed=1)
    source.save_pretrained(folder)
    model = tiny_transformer(seed=2)
    _, told = take(model, folder, ("owl", "bat", "fox"))
    assert_same_tensors(model.state_dict(), source.state_dict())
    assert told.splitlines()[1:] == ["  class table: all 3 rows, in order (the source does not name its classes)"]
    assert read_source(str(folder)).prediction_type is None
    # Another number of rows could be any classes.
    model = tiny_transformer(seed=2, num_classes=2)
    fresh, told = take(model, folder, ("owl", "bat"))
    assert torch.equal(model.class_embed.weight[:2], fresh[CLASS_TABLE][:2])
    assert torch.equal(model.class_embed.weight[2], source.class_embed.weight[3])
    assert "the null row and 0 classes of the same name; 2 stay fresh (the source does not name its 3)" in told


def test_shards_are_read_by_their_index(folder):
    source = tiny_transformer(seed=1)
    source.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*-of-*.safetensors"))
    assert len(shards) > 2
    # A shard that the index does not name is left over from something else.
    save_file({"proj_out.bias": torch.ones(16)}, folder / "diffusion_pytorch_model-99999-of-99999.safetensors")
    model = tiny_transformer(seed=2)
    take(model, folder)
    assert_same_tensors(model.state_dict(), source.state_dict())
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1].name}"):
        read_source(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_in_float32(dtype, folder):
    given = save_pipeline(folder, tiny_transformer(seed=1).to(dtype), ("dog", "cat", "wild"))
    assert {tensor.dtype for tensor in given.values()} == {dtype}
    model = tiny_transformer(seed=2)
    fresh, _ = take(model, folder)
    assert_taken(model, fresh, given | {CLASS_TABLE: given[CLASS_TABLE][[1, 0, 2, 3]]})
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_what_is_not_there_or_not_whole_is_refused(folder):
    folder.mkdir()
    with pytest.raises(ValueError) as refused:
        read_source(str(folder))
    for looked_for in (str(folder), "model_index.json", "config.json", "state.json", "config.yaml"):
        assert looked_for in str(refused.value)

    save_pipeline(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{weights.name} is damaged"):
        read_source(str(folder))
    # Weights in half precision beside the others are another choice, and not one of this package.
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ValueError, match=r"lacks diffusion_pytorch_model.safetensors") as refused:
        read_source(str(folder))
    assert f"`init_from` ({folder})" in str(refused.value)


# -- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs",
    [
        ("cat", "dog", "wild"),
        ("wild", "cat", "dog"),
        ("dog", "owl", "cat"),
        ("owl", "bat", "fox"),  # as many, but others: no row is a class of this data
        ("owl", "wild", "bat", "dog", "fox"),
        ("dog",),
        ("owl",),
    ],
    ids="-".join,
)
def test_class_rows_go_by_name(theirs, folder):
    given = save_pipeline(folder, tiny_transformer(seed=1, num_classes=len(theirs)), theirs)
    model = tiny_transformer(seed=2)
    fresh, told = take(model, folder)
    table = model.class_embed.weight
    for row, name in enumerate(NAMES):
        expected = given[CLASS_TABLE][theirs.index(name)] if name in theirs else fresh[CLASS_TABLE][row]
        assert torch.equal(table[row], expected), name
    assert torch.equal(table[-1], given[CLASS_TABLE][-1])
    assert_taken(model, fresh, given | {CLASS_TABLE: table})

    missing = [name for name in NAMES if name not in theirs]
    line = f"the null row and {3 - len(missing)} classes of the same name; {len(missing)} stay fresh"
    line += f" ({', '.join(missing)})" if missing else ""
    assert f"  class table: {line}" in told.splitlines()
    others = fresh.keys() - {CLASS_TABLE}
    assert share(model, *others, rows=4 - len(missing)) in told
    assert ("num_classes 5 (here 3)" in told) == (len(theirs) == 5)


def test_class_rows_go_by_name_in_any_unicode_form(folder):
    given = save_pipeline(folder, tiny_transformer(seed=1), ("wild", "cafe\u0301", "dog"))
    model = tiny_transformer(seed=2)
    take(model, folder, ("caf\u00e9", "dog", "wild"))
    assert torch.equal(model.class_embed.weight, given[CLASS_TABLE][[1, 2, 0, 3]])


def test_a_pipeline_may_name_only_some_of_its_classes(folder):
    source = tiny_transformer(seed=1, num_classes=12)
    make_pipeline(source, id2label={10: "dog", 2: "wild"}).save_pretrained(folder)
    model = tiny_transformer(seed=2)
    fresh, _ = take(model, folder)
    expected = [fresh[CLASS_TABLE][0], *source.class_embed.weight[[10, 2, 12]]]
    assert torch.equal(model.class_embed.weight, torch.stack(expected))


def test_many_new_classes_are_told_briefly(folder):
    save_pipeline(folder)
    names = tuple(f"class {number}" for number in range(200))
    _, told = take(tiny_transformer(num_classes=200), folder, names)
    assert "200 stay fresh (class 0, class 1, class 2, class 3, class 4, ...)" in told


CONDITIONS = {
    "none": ({"num_classes": None}, set()),
    "class": ({}, {CLASS_TABLE}),
    "text": ({"num_classes": None, "pooled_projection_dim": TEXT_DIM}, {"text_embed.weight", "text_embed.bias"}),
}


@pytest.mark.parametrize(("theirs", "ours"), [*itertools.product(CONDITIONS, repeat=2)])
def test_a_condition_of_another_kind_stays_fresh(theirs, ours, folder):
    source = tiny_transformer(seed=1, **CONDITIONS[theirs][0])
    source.save_pretrained(folder)
    model = tiny_transformer(seed=2, **CONDITIONS[ours][0])
    fresh, told = take(model, folder, NAMES if ours == "class" else ())
    own = CONDITIONS[ours][1] if ours != theirs else set()
    assert_taken(model, fresh, source.state_dict(), but=own)
    lines = told.splitlines()
    for name in own:
        assert f"  stays fresh, not in the source: {name}" in lines
    for name in CONDITIONS[theirs][1] if ours != theirs else ():
        assert f"  left out, in the source only: {name}" in lines
    assert share(model, *(fresh.keys() - own)) in told


# -- other sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours"), [(2, 4), (4, 2)])
def test_blocks_at_another_depth(theirs, ours, folder):
    source = tiny_transformer("freq_gate", seed=1, num_layers=theirs)
    source.save_pretrained(folder)
    model = tiny_transformer("freq_gate", seed=2, num_layers=ours)
    fresh, told = take(model, folder)
    extra = {name for name in fresh if name.startswith(("transformer_blocks.2.", "transformer_blocks.3."))}
    assert_taken(model, fresh, source.state_dict(), but=extra)
    assert f"  the source was built with num_layers {theirs} (here {ours})" in told.splitlines()
    assert share(model, *(fresh.keys() - extra)) in told
    # Each tensor once, whatever the number of blocks.
    where = "stays fresh, not in the source" if ours == 4 else "left out, in the source only"
    for name in ("attn.to_q.weight", "gate.1.bias"):
        assert told.splitlines().count(f"  {where}: transformer_blocks.{{2,3}}.{name}") == 1
    assert told.count(where) == len(source.transformer_blocks[0].state_dict())


@pytest.mark.parametrize(
    ("changes", "but"),
    [
        ({"patch_size": 4}, INPUT | OUTPUT),
        ({"in_channels": 3}, INPUT | OUTPUT),
        ({"in_channels": 3, "out_channels": 4}, INPUT),
        ({"sample_size": 16}, set()),
        ({"mlp_ratio": 2.0}, MLP),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_only_tensors_of_other_shape_stay_fresh(changes, but, folder):
    source = tiny_transformer(seed=1)
    source.save_pretrained(folder)
    model = tiny_transformer(seed=2, **changes)
    fresh, told = take(model, folder)
    assert_taken(model, fresh, source.state_dict(), but=but)
    lines = [line.removeprefix("  stays fresh, of other shape: ") for line in told.splitlines()]
    for name in but:
        shapes = f"{tuple(fresh[name].shape)}, there {tuple(source.state_dict()[name].shape)}"
        assert f"{re.sub('blocks.[01]', 'blocks.{0,1}', name)} {shapes}" in lines
    assert share(model, *(fresh.keys() - but)) in told
    for name, value in changes.items():
        assert f"{name} {source.config[name]} (here {value})" in told


def test_what_no_shape_shows_is_told(folder):
    """As many channels in other heads fit everywhere, and are another function."""
    tiny_transformer(seed=1, activation_fn="linear-silu").save_pretrained(folder)
    model = tiny_transformer(seed=2, num_attention_heads=4, attention_head_dim=8)
    _, told = take(model, folder)
    assert "100.0%" in told
    for difference in (
        "num_attention_heads 2 (here 4)",
        "attention_head_dim 16 (here 8)",
        "activation_fn linear-silu (here gelu-approximate)",
    ):
        assert difference in told


def test_another_variant_gives_what_it_shares(folder):
    source = tiny_transformer("adaln_zero", seed=1)
    source.save_pretrained(folder)
    model = tiny_transformer("freq_gate", seed=2)
    fresh, told = take(model, folder)
    mixing = {name for name in fresh if any(part in name for part in (".gate.", ".low.", ".high."))}
    assert len(mixing) == 12
    assert_taken(model, fresh, source.state_dict(), but=mixing)
    assert "  stays fresh, not in the source: transformer_blocks.{0,1}.gate.1.weight" in told.splitlines()
    assert told.count("stays fresh, not in the source") == 6


@pytest.mark.parametrize("changes", [{}, {"modulation_rank": 4}], ids=["plain", "low_rank"])
def test_a_residual_gate_starts_as_its_adaln_zero_source(changes, folder):
    source = tiny_transformer("adaln_zero", seed=1, **changes)
    source.save_pretrained(folder)
    model = VARIANTS["freq_gate"].from_config(tiny_transformer("freq_gate", gate_residual=True, **changes).config)
    take(model, folder)
    assert torch.equal(output(model), output(source)) and output(source).any()


@pytest.mark.parametrize("views", [2, 3])
def test_coarse_views_start_from_the_full_grid(views, folder):
    """Those that the source does not have; a view of the source that is one too many is left out, and told."""
    wiener = {"preconditioning": "wiener", "prediction_type": "epsilon"}
    theirs, ours = (tiny_transformer(seed=seed, grid_views=n, **wiener) for seed, n in ((1, 1), (2, views)))
    save_pipeline(folder, theirs)
    fresh, report = take(ours, folder)
    for embed, head in zip(ours.coarse_patch_embeds, ours.coarse_proj_outs, strict=True):
        assert_same_tensors(embed.state_dict(), theirs.patch_embed.state_dict())
        assert_same_tensors(head.state_dict(), theirs.proj_out.state_dict())
    assert "full grid" in report and "stays fresh" not in report and f"grid_views 1 (here {views})" in report
    # And back: what is of views alone has no place.
    shutil.rmtree(folder)
    save_pipeline(folder, ours)
    plain = tiny_transformer(seed=3, **wiener)
    report = take(plain, folder)[1]
    assert torch.equal(plain.proj_out.weight, ours.proj_out.weight) and "coarse_proj_outs.0.weight" in report


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}], ids=["plain", "qk_norm"])
def test_another_width_is_refused(changes, folder):
    """The norms of queries and keys fit at any number of heads; they alone are no start."""
    tiny_transformer(seed=1, num_attention_heads=4, **changes).save_pretrained(folder)
    model = tiny_transformer(seed=2, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as refused:
        take(model, folder)
    message = str(refused.value)
    assert f"`init_from` ({folder}) has no transformer block that fits" in message
    assert "transformer_blocks.0.attn.to_q.weight is (32, 32) here and (64, 64) there" in message
    assert "num_attention_heads 4 (here 2)" in message
    assert "Choose `num_attention_heads` and `attention_head_dim`" in message
    assert_same_tensors(model.state_dict(), before)


def test_another_architecture_is_refused(folder):
    tiny_transformer(seed=1).save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file(
        {
            name.replace(".attn.", ".attn1.").replace(".ff.", ".mlp.").replace("modulation", "norm1"): tensor
            for name, tensor in load_file(weights).items()
        },
        weights,
    )
    model = tiny_transformer(seed=2)
    with pytest.raises(ValueError, match="another architecture.*name a model of this package"):
        take(model, folder)
    assert_same_tensors(model.state_dict(), tiny_transformer(seed=2).state_dict())


# -- of other origin --------------------------------------------------------------------------------------------------


def save_dit(folder, **kwargs) -> DiTTransformer2DModel:
    transformer = tiny_dit(seed=1, **kwargs)
    transformer.save_pretrained(folder)
    return transformer


def change_json(file, **changes):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **changes}))


def pickle_weights(folder):
    """As repositories were before safetensors."""
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


# Knobs of a model that computes what diffusers' DiT does.
AS_IN_DIFFUSERS = {"freq_shift": 1, "mlp_norm_eps": 1e-5}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_dit_of_diffusers_is_converted(name, pickled, folder):
    transformer = save_dit(folder)
    # What it was called when facebook/DiT-XL-2-256 was written.
    change_json(folder / "config.json", _class_name=name)
    if pickled:
        pickle_weights(folder)
    knobs = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    model = ModelConfig("adaln_zero", **knobs, **AS_IN_DIFFUSERS).build(4, 8, {"num_classes": 3}, ObjectiveConfig())
    _, told = take(model, folder)
    with torch.no_grad():
        expected = transformer(**inputs(model)).sample[:, :4]
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)
    assert told == (
        f"initialised from {folder}: 100.0% of the parameters\n"
        "  class table: all 3 rows, in order (the source does not name its classes)"
    )
    # Not so with the defaults, which is told.
    _, told = take(tiny_transformer(seed=2), folder)
    assert "  the source was built with mlp_norm_eps 1e-05 (here None), freq_shift 1 (here 0)" in told.splitlines()


def test_a_pipeline_of_diffusers_names_its_classes(folder):
    transformer = save_dit(folder / "transformer")
    change_json(folder / "model_index.json", _class_name="DiTPipeline", id2label={"0": "wild", "1": "owl", "2": "cat"})
    model = tiny_transformer(seed=2, **AS_IN_DIFFUSERS)
    fresh, told = take(model, folder)
    given = from_diffusers(transformer).state_dict()
    expected = torch.stack([given[CLASS_TABLE][2], fresh[CLASS_TABLE][1], *given[CLASS_TABLE][[0, 3]]])
    assert_taken(model, fresh, given | {CLASS_TABLE: expected})
    assert "the null row and 2 classes of the same name; 1 stay fresh (dog)" in told
    assert read_source(str(folder)).prediction_type is None
    change_json(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    assert read_source(str(folder)).prediction_type == "epsilon"
    # Of two classes with one name neither is meant for certain.
    change_json(folder / "model_index.json", id2label={"0": "cat", "1": "owl", "2": "cat"})
    assert read_source(str(folder)).class_rows == {"cat (0)": 0, "owl": 1, "cat (2)": 2}


def test_what_is_wrong_with_a_dit_of_diffusers_is_told(folder):
    save_dit(folder, norm_elementwise_affine=True)
    with pytest.raises(ValueError) as refused:
        read_source(str(folder))
    assert f"`init_from` ({folder}), a DiTTransformer2DModel: `norm_elementwise_affine` (True)" in str(refused.value)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="Unable to load weights"):
        read_source(str(folder))
    weights.unlink()
    with pytest.raises(ValueError, match="lacks diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin"):
        read_source(str(folder))


def test_other_transformers_of_diffusers_are_not_converted(folder):
    given = save_dit(folder).state_dict()
    change_json(folder / "config.json", _class_name="Transformer2DModel", norm_type="layer_norm")
    assert_same_tensors(read_source(str(folder)).tensors, given)


def official(model) -> dict[str, torch.Tensor]:
    """Weights of an adaLN-Zero model under DiT's names."""
    renamed = {
        "patch_embed": "x_embedder.proj",
        "time_embed.linear_1": "t_embedder.mlp.0",
        "time_embed.linear_2": "t_embedder.mlp.2",
        "class_embed": "y_embedder.embedding_table",
        "modulation_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "transformer_blocks": "blocks",
        "modulation.linear": "adaLN_modulation.1",
        "attn.to_out": "attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in renamed.items():
            name = re.sub(rf"(^|(?<=\.)){ours}(?=\.)", theirs, name)
        weights[name] = tensor
    for block in range(model.config.num_layers):
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"blocks.{block}.attn.to_{letter}.{kind}") for letter in "qkv"]
            weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return weights


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_official_checkpoint_is_converted(suffix, folder):
    """The width has to be one whose heads are known: 384."""
    width = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 1}
    source = tiny_transformer(seed=1, **width)
    folder.mkdir()
    file = folder / f"DiT.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(official(source), file)
    model = tiny_transformer(seed=2, **width)
    _, told = take(model, file)
    assert_same_tensors(model.state_dict(), source.state_dict())
    assert f"initialised from {file}: 100.0% of the parameters" in told
    assert read_source(str(file)).prediction_type == "epsilon"


def test_a_file_that_is_no_official_checkpoint_is_refused(folder):
    folder.mkdir()
    file = folder / "weights.safetensors"
    save_file(tiny_transformer().state_dict(), file)
    with pytest.raises(ValueError) as refused:
        read_source(str(file))
    message = str(refused.value)
    assert f"`init_from` ({file}), read as an official DiT checkpoint: `state_dict` lacks blocks.0." in message
    save_file(official(tiny_transformer()), file)
    with pytest.raises(ValueError, match="`num_attention_heads` is not in a checkpoint.*width 32"):
        read_source(str(file))


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache(hub, folder):
    given = save_pipeline(folder, names=("dog", "cat", "owl"))
    repository = hub / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef")
    shutil.copytree(folder, repository / "snapshots" / "0123456789abcdef")
    model = tiny_transformer(seed=2)
    fresh, told = take(model, "user/name")
    expected = torch.stack([*given[CLASS_TABLE][[1, 0]], fresh[CLASS_TABLE][2], given[CLASS_TABLE][3]])
    assert_taken(model, fresh, given | {CLASS_TABLE: expected})
    assert told.startswith("initialised from user/name: ")


@pytest.mark.parametrize("name", ["user/wrong", "runs/mine/pipeline", "not a name"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a user has trained, a run of this name may lie
    with pytest.raises(ValueError) as refused:
        read_source(name)
    message = str(refused.value)
    assert f"`init_from` ({name}) is not a folder" in message and "from the Hub" in message and "\n" not in message
    assert "spelling" in message and str(hub) not in message


def test_only_the_transformer_is_downloaded():
    wanted = [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "scheduler/scheduler_config.json",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    others = [
        "README.md",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "checkpoints/step_00000001/model.safetensors",
    ]
    assert list(filter_repo_objects(wanted + others, allow_patterns=HUB_FILES)) == wanted


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_pickled_weights_are_downloaded_only_where_there_are_no_others(pickled, folder, tmp_path, monkeypatch):
    """From a repository that holds both, or `.bin` only; a download is a copy here."""
    repository = tmp_path / "repository"
    transformer = save_dit(repository / "transformer")
    change_json(repository / "model_index.json", _class_name="DiTPipeline")
    weights = repository / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    if pickled:
        weights.unlink()

    def download(name, revision, allow_patterns):
        files = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / file, folder / file)
        return str(folder)

    monkeypatch.setattr("freqgate_dit.training.initialise.snapshot_download", download)
    source = read_source("user/name")
    assert_same_tensors(source.tensors, from_diffusers(transformer).state_dict())
    assert [(folder / file).is_file() for file in PICKLED_FILES] == [False, pickled]


# -- runs of the trainer ----------------------------------------------------------------------------------------------


DEFAULTS = {"max_steps": 2, "report_to": "none"}


@pytest.fixture
def options(options):
    return partial(options, **DEFAULTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory, cache):
    """A run of 16 steps with two checkpoints and a pipeline; tests copy what they change."""
    folder = tmp_path_factory.mktemp("base") / "run"
    changes = {"max_steps": 16, "save_every": 8, "output_dir": folder, "cache_dir": cache}
    train(command_line({**TINY, **DEFAULTS, **changes}))
    return folder


def test_fine_tuning_starts_where_its_source_has_come(base, tmp_path, options, capsys):
    source = tmp_path / "source"
    shutil.copytree(base, source)
    start = {"init_from": source / "pipeline", "save_every": 1}
    main(options(output_dir=tmp_path / "straight", **start))
    told = capsys.readouterr().out
    assert f"initialised from {source / 'pipeline'}: 100.0% of the parameters" in told
    assert "and 64 classes of the same name; 0 stay fresh" in told and "note: the source predicts" not in told

    # The first weights are those that the source has published, of the averages too.
    (scratch, *_, end), (first, *_) = (metrics(folder) for folder in (base, tmp_path / "straight"))
    assert first["step"] == scratch["step"] == 0 and end["step"] == 16
    for name in ("val_raw/loss", "val_ema/loss"):
        assert first[name] == pytest.approx(end["val_ema/loss"], rel=1e-6) and first[name] < 0.95 * scratch[name]

    # It is in config.yaml. A resumed run does not need it any more, and ends as the straight one.
    train(options(max_steps=1, **start))
    assert parse_config(["--config", str(tmp_path / "run" / "config.yaml")]).train.init_from == str(
        source / "pipeline"
    )
    shutil.rmtree(source)
    train(["--config", str(tmp_path / "run" / "config.yaml"), "--max_steps=2", "--resume=latest"])
    for group, tensors in state(tmp_path / "straight", 2).items():
        assert_same_tensors(tensors, state(tmp_path / "run", 2)[group])
    assert str(source / "pipeline") in refusal(options(output_dir=tmp_path / "other", **start))
    assert not (tmp_path / "other").exists()


def test_a_freq_gate_run_starts_where_an_adaln_zero_run_has_come(tmp_path, options):
    source = tmp_path / "source"
    train(options(variant="adaln_zero", output_dir=source))
    train(options(variant="freq_gate", gate_residual="true", init_from=source))
    end, first = metrics(source)[-1], metrics(tmp_path / "run")[0]
    assert first["step"] == 0 and end["step"] == 2
    for name in ("val_raw/loss", "val_ema/loss"):
        assert first[name] == end["val_ema/loss"]


def test_a_run_gives_its_newest_complete_checkpoint(base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run)
    averages = {step: state(run, step)["ema-0.9"] for step in (8, 16)}
    newest = read_source(str(run))
    assert newest.place == f"{run} (step 16, average 0.9)" and newest.prediction_type == "v_prediction"
    assert_same_tensors(newest.tensors, averages[16])
    assert_same_tensors(newest.tensors, read_source(str(run / "pipeline")).tensors)
    assert newest.class_rows == read_source(str(run / "pipeline")).class_rows and len(newest.class_rows) == 64

    old, new = (run / "checkpoints" / f"step_{step:08d}" for step in (8, 16))
    assert_same_tensors(read_source(str(old)).tensors, averages[8])
    (new / "manifest.json").unlink()
    with pytest.raises(ValueError) as refused:
        read_source(str(new))
    assert f"`init_from` ({new})" in str(refused.value) and f"{new.name} has no manifest.json" in str(refused.value)
    assert read_source(str(run)).place == f"{run} (step 8, average 0.9)"
    # Checkpoints may be deleted to make room: the pipeline has the same weights.
    shutil.rmtree(run / "checkpoints")
    assert_same_tensors(read_source(str(run)).tensors, averages[16])
    shutil.rmtree(run / "pipeline")
    with pytest.raises(ValueError, match="without a complete checkpoint or a pipeline"):
        read_source(str(run))


def test_a_checkpoint_knows_how_its_model_was_built(base):
    (checkpoint,) = (base / "checkpoints").glob("step_*16")
    changes = {"in_channels": 3, "sample_size": 32, "patch_size": 8, "num_classes": 64, "mlp_ratio": 2.0}
    names = tuple(read_source(str(checkpoint)).class_rows)
    _, told = take(tiny_transformer("freq_gate", **changes), checkpoint, names)
    assert "the source was built with" not in told and "100.0%" in told
    _, told = take(tiny_transformer("freq_gate", **changes, num_layers=3), checkpoint, names)
    assert "  the source was built with num_layers 2 (here 3)" in told.splitlines()


def test_another_prediction_type_is_told(base, tmp_path, options, capsys):
    start = {"init_from": base, "prediction_type": "epsilon"}
    main([*options(**start), "--dry_run"])
    assert "note: the source predicts v_prediction, this run epsilon" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
