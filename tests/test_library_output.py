"""What model libraries write stays out of our output, or becomes lines of our log."""

import subprocess
import sys

import pytest

from amusd.library_output import cause_of

SERVICE = """
import logging, warnings
from amusd.observe.log_format import LogFormat
from amusd.observe.logging_setup import LogLevel, start_logging
start_logging("verify", LogLevel.{level}, LogFormat.{log_format})
import huggingface_hub.utils.logging as hub_logging
import transformers.utils.logging as library_logging
hub = hub_logging.get_logger("huggingface_hub.utils._http")
library = library_logging.get_logger("transformers.models")
hub.warning("Retrying in 1s")
library.warning("a warning")
library.info("a remark")
library.error("an error")
warnings.warn("first line\\nsecond line")
"""


def lines_of(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def service(level: str, log_format: str) -> list[str]:
    return lines_of(SERVICE.format(level=level, log_format=log_format))


def test_what_libraries_log_becomes_single_lines_of_a_services_log() -> None:
    lines = service("INFO", "TEXT")
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING verify Retrying in 1s",
        "WARNING verify a warning",
        "ERROR verify an error",
        "WARNING verify UserWarning: first line second line",
    ]


def test_a_higher_log_level_holds_for_libraries_too() -> None:
    assert [line.split(" ", 2)[2] for line in service("ERROR", "TEXT")] == ["ERROR verify an error"]


def test_bars_of_libraries_are_off_in_every_command() -> None:
    code = (
        "import sys, types\n"
        "def run(standalone_mode):\n"
        "    import logging, warnings\n"
        "    from huggingface_hub.utils import tqdm\n"
        "    import transformers.utils.logging as library_logging\n"
        "    list(tqdm(range(3))); list(library_logging.tqdm(range(3)))\n"
        "    library_logging.get_logger('transformers.models').warning('a warning')\n"
        "    logging.getLogger('huggingface_hub').warning('Retrying')\n"
        "    warnings.warn('a warning')\n"
        "sys.modules['amusd.cli.app'] = types.SimpleNamespace(app=run)\n"
        "sys.argv = ['amusd', 'acceptance']\n"
        "from amusd.cli import main\n"
        "main()\n"
    )
    assert lines_of(code) == []


def test_a_missing_package_is_the_cause_behind_a_general_message() -> None:
    def load() -> None:
        try:
            raise ImportError("the 'socksio' package is not installed")
        except ImportError:
            raise OSError("cannot load the configuration\nmore")  # noqa: B904

    with pytest.raises(OSError, match="configuration") as caught:
        load()
    assert cause_of(caught.value) == "the 'socksio' package is not installed"


@pytest.mark.parametrize(
    ("error", "words"), [(OSError("one.\ntwo"), "one"), (KeyError(), "KeyError")]
)
def test_a_cause_is_one_line(error: Exception, words: str) -> None:
    assert cause_of(error) == words
