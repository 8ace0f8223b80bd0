"""Keep what describes the model that `make demo` trained, without its weights, and make model_card.md from it.

python benchmarks/demo_card.py --pipeline demo/run/pipeline
"""

import argparse
import shutil
from pathlib import Path

from freqgate_dit.files import write_text
from freqgate_dit.model_card import render_card


ROOT = Path(__file__).resolve().parents[1]
KEPT = "results/demo_model"
LEFT_OUT = ("*.safetensors", "*.py", "README.md")


def render_demo_card() -> str:
    """The text of model_card.md, from the files in `KEPT`."""
    return str(render_card(ROOT / KEPT, name="demo/run/pipeline", beside=f"{KEPT}/"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", type=Path, default=Path("demo/run/pipeline"), help="what `make demo` has trained"
    )
    pipeline = parser.parse_args().pipeline
    shutil.rmtree(ROOT / KEPT, ignore_errors=True)
    shutil.copytree(pipeline, ROOT / KEPT, ignore=shutil.ignore_patterns(*LEFT_OUT))
    write_text(ROOT / "model_card.md", render_demo_card())
    print(f"wrote model_card.md and {KEPT}/")


if __name__ == "__main__":
    main()
