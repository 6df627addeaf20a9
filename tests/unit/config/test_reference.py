"""docs/keys.md is what the declarations say."""

from pathlib import Path

from erniekit.config.reference import markdown
from erniekit.config.run import ALIASES, KEYS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "keys.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "python -m erniekit.config.reference > docs/keys.md"


def test_every_key_has_a_row():
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(KEYS)
    assert all(line.replace("\\|", "").count("|") == 6 for line in rows)
    assert all(f"`{alias}`" in markdown() for alias in ALIASES)


def test_a_row_says_what_matters():
    page = markdown()
    assert "| `batch_size` | a whole number | 1 | Rows of a micro-batch on one device. Also written" in page
    assert "| `fuse_rope` | true or false | false | Fused rotary embedding. | speed; not built |" in page
    assert "| `fine_tuning` | text | Full (ERNIEKit: LoRA) |" in page
