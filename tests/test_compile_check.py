"""The table of official programs: resumed where it stopped, never with a row of an older program, and it tells what got worse."""

import json

import pytest

from msr_jax.errors import UserError
from tests.conftest import launch_script


@pytest.fixture
def script():
    return launch_script("compile_check")


@pytest.fixture
def compiled(script, monkeypatch):
    """What stands for compiling: the rows that were, in order, with a work space that a test sets."""
    state = {"ran": [], "work_space": 2e9, "fits": True, "key": "k1"}

    def of(row):
        return {
            "program": row.program, "target": row.target, "seconds": 1.0, "examples": 2, "fits": state["fits"],
            "refused": "" if state["fits"] else "RESOURCE_EXHAUSTED: no room", "needs": 3e9, "has": 1e9,
            "work_space": state["work_space"], "compiler": "libtpu 1", "key": state["key"],
        }  # fmt: skip

    def run(row, minutes):
        state["ran"].append((row.program, row.target))
        return of(row)

    state["of"] = of
    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "sources", lambda: "s1")
    return state


def test_every_official_program_is_asked_for_on_every_chip(script):
    rows = list(script.rows())
    assert len(rows) == len(set(rows)) == 6 * (8 + 12)
    stages = (*script.STAGES, "det_x2")
    assert {row.options[0] for row in rows} == {f"configs/{t}_{s}.py" for t in ("unet", "bsrf") for s in stages}
    assert all((script.ROOT / row.options[0]).is_file() for row in rows)


def test_the_readme_has_the_committed_table_as_the_script_prints_it(script):
    committed = json.loads(script.COMMITTED.read_text())["rows"]
    assert script.tables(committed, list(script.rows())) in (script.ROOT / "launch" / "README.md").read_text()


def test_it_says_how_many_devices_share_the_released_batch(script, compiled):
    rows = list(script.rows())
    found = [{**compiled["of"](rows[0]), "needs": 22e9, "has": 70e9, "work_space": 2e9}]  # 20 GB, and 1 for each of 50
    found += [compiled["of"](row) for row in rows if (row.program, row.target) == ("bsrf_det", "v5e:1x1")]
    assert "| unet_det | 150 | 50, 1.00; 3 | not compiled yet |" in script.which_chip(found, rows)


def test_it_goes_on_where_it_stopped_and_compiles_anew_what_has_changed(
    script, compiled, tmp_path, monkeypatch, capsys
):
    chosen = [str(tmp_path), "--programs", "unet_det", "bsrf_det", "--targets", "h200:1"]
    monkeypatch.setattr(script, "COMMITTED", tmp_path / "none.json")
    assert script.main([*chosen, "--limit", "-1"]) == 0 and compiled["ran"] == []
    assert script.main(chosen) == 0 and script.main(chosen) == 0
    assert compiled["ran"] == [("unet_det", "h200:1"), ("bsrf_det", "h200:1")]
    table = (tmp_path / "table.md").read_text()
    assert "| unet_det | 2.00 (2) |" in table and "2 of 120 compiled" in table
    assert "Not compiled yet on any chip: unet_diffusion, " in table and "for any program: v5e:1x1, " in table
    monkeypatch.setattr(script, "sources", lambda: "s2")
    script.main([*chosen[:3], "--targets", "h200:1"])
    assert len(compiled["ran"]) == 3
    assert "1 of 120 compiled" in (tmp_path / "table.md").read_text()  # the other row is of an older program


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{"program": "unet_det"}]}'])
def test_a_damaged_table_is_named_and_stays(script, compiled, tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(UserError, match=r"table\.json is damaged, or no table of this script's; remove it"):
        script.main([str(tmp_path), "--programs", "unet_det"])
    assert (tmp_path / "table.json").read_text() == text and compiled["ran"] == []


def test_a_program_that_does_not_exist_is_refused(script, compiled, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main([str(tmp_path / "out"), "--programs", "unet_dett"])
    assert ended.value.code == 2 and "unet_dett" in capsys.readouterr().err and compiled["ran"] == []


def test_a_row_that_takes_too_long_is_given_up_and_tried_again_with_more(script, tmp_path, monkeypatch):
    given = []

    def plan(command, timeout, **_):
        given.append(timeout)
        raise script.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(script.subprocess, "run", plan)
    row = script.run(next(iter(script.rows())), 15)
    assert given == [900] and not row["fits"] and row["refused"] == "not compiled in 15 minutes"
    monkeypatch.setattr(script, "sources", lambda: "s1")
    monkeypatch.setattr(script, "commit_of", lambda: "c")
    chosen = [str(tmp_path), "--programs", "unet_det", "--targets", "h200:1", "--each"]
    for minutes in ("15", "15", "20"):
        script.main([*chosen, minutes])
    assert given[1:] == [900, 1200]


def test_what_no_longer_fits_or_grows_by_a_twentieth_fails(script, compiled, tmp_path, monkeypatch, capsys):
    chosen = ["--programs", "unet_det", "--targets", "h200:1"]
    monkeypatch.setattr(script, "COMMITTED", tmp_path / "committed" / "table.json")
    assert script.main([str(tmp_path / "committed"), *chosen]) == 0
    for k, (change, code) in enumerate(
        (({"work_space": 2.09e9}, 0), ({"work_space": 2.11e9}, 1), ({"fits": False}, 1))
    ):
        compiled.update(change)
        assert script.main([str(tmp_path / str(k)), *chosen]) == code
    said = capsys.readouterr().out
    assert "work space from 2.00 to 2.11 GB" in said and "no longer compiles and fits: RESOURCE_EXHAUSTED" in said
    assert json.loads((tmp_path / "2" / "table.json").read_text())["rows"][0]["fits"] is False
