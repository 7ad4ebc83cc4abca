"""The machine in the head of reports."""

from pathlib import Path

from amusd.cli.machine import processor, provenance


def test_the_processor_is_named_by_its_model(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some Chip @ 2 GHz\nmodel name\t: Other\n")
    assert processor(cpuinfo) == "Some Chip @ 2 GHz"


def test_a_processor_without_a_model_still_has_a_name(tmp_path: Path) -> None:
    assert processor(tmp_path / "none")


def test_a_report_has_its_date_versions_and_machine() -> None:
    head = provenance()
    assert {"amusd", "date", "machine"} == set(head)
    assert {"processor", "cpus", "torch", "transformers"} <= set(head["machine"])
