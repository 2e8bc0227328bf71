"""`univg report` without stages: a page about any evaluations."""

from tests.evaluation.report.test_page import write_card
from univg_jax.cli.main import main


def test_evaluations_are_on_a_page_and_damaged_ones_are_named(tmp_path, capsys):
    shown, other, torn = (write_card(tmp_path / "a", steps=steps) for steps in (1, 2, 3))
    (torn / "results.json").write_text("{")
    out = tmp_path / "out"
    assert main(["report", f"--evaluation={tmp_path / 'a'}", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out / 'report.html'}" in said
    assert f"not shown: {torn.name}" in said
    assert main(["report", f"--evaluation={other},{shown}", f"--out={out}"]) == 0
    page = (out / "report.html").read_text()
    assert page.index("steps 2") < page.index("steps 1")


def test_what_is_not_there_is_named(tmp_path, capsys):
    for given, line in ((tmp_path, "has no evaluation"), (",", "--evaluation is empty")):
        assert main(["report", f"--evaluation={given}", f"--out={tmp_path / 'out'}"]) == 1
        assert line in capsys.readouterr().err
