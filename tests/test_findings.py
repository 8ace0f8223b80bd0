"""Findings of a report beside a pipeline."""

import json

import pytest
from components import make_pipeline, tiny_transformer

from freqgate_dit.findings import Findings
from freqgate_dit.model_card import render_card
from freqgate_dit.summary import read_summary
from freqgate_dit.training.publishing import describe_other_weights


CLAIM = {"claim": "Gates | go one way.", "verdict": "undecided", "evidence": "blocks +-"}
FINDINGS = Findings([CLAIM], {"images": 128, "guidance": "none"}, "python training/analyze.py --pipeline FOLDER")


@pytest.fixture
def folder(tmp_path):
    make_pipeline(tiny_transformer()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_findings_are_read_as_they_were_saved_and_stand_in_the_card(folder):
    assert "What it does with frequency" not in str(render_card(folder))
    assert FINDINGS.save(folder).name == "analysis.json"
    assert read_summary(folder).findings == FINDINGS
    card = str(render_card(folder))
    assert "\n## What it does with frequency\n" in card and "images 128, guidance none" in card
    assert r"| Gates \| go one way. | undecided | blocks +- |" in card


def test_findings_go_with_the_weights_that_they_are_of(folder):
    FINDINGS.save(folder)
    describe_other_weights(folder, make_pipeline(tiny_transformer()), "0.999", "other")
    assert not (folder / "analysis.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"claims": []}, "`claims` is empty"),
        ({"claims": [{"claim": "x", "verdict": "supported"}]}, r"`claims\[0\]` lacks 'evidence'"),
        ({"claims": [{**CLAIM, "verdict": "proved"}]}, "verdict 'proved': choose one of supported, not supported"),
        ({"protocol": {"images": [1]}}, "`protocol` has 'images'"),
        ({"protocol": {"seconds": float("nan")}}, "`protocol` has 'seconds' nan"),
        ({"command": None}, "`Findings` has 'command' None"),
    ],
)
def test_findings_that_make_no_sense(changes, message, folder):
    values = {"claims": [CLAIM], "protocol": {}, "command": "x", **changes}
    with pytest.raises(ValueError, match=message):
        Findings(**values)
    (folder / "analysis.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"analysis.json: .*{message}.*or delete the file"):
        read_summary(folder)


def test_findings_have_a_folder_and_no_path_of_this_machine(folder, tmp_path):
    with pytest.raises(ValueError, match="is no pipeline folder"):
        FINDINGS.save(tmp_path)
    with pytest.raises(ValueError, match="the analysis has the absolute path /home/me/model in it"):
        Findings([CLAIM], {}, "analyze.py --pipeline /home/me/model").save(folder)
    with pytest.raises(ValueError, match="the analysis has the absolute path /home/me/a.png in it"):
        Findings([{**CLAIM, "evidence": "see /home/me/a.png"}], {}, "x").save(folder)
    (folder / "analysis.json").write_text("{}")
    with pytest.raises(ValueError, match="analysis.json: it lacks 'claims'"):
        read_summary(folder)
