"""What commands print: texts with square brackets in full, and tables of rows that lack a column."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.db.database import Database
from server.settings import Settings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with an empty database."""
    Database(Settings(data=tmp_path).database).close()
    return tmp_path


def test_an_error_is_printed_with_its_square_brackets(data: Path):
    (data / "fal-prices.toml").write_text("[kling]\nper_hour = 1\n")
    result = CliRunner().invoke(app, ["usage", "--data", str(data)])
    assert result.exit_code == 1
    assert "[kling] may hold per_call" in result.stderr.replace("\n", "")


def test_the_prediction_error_before_any_job(data: Path):
    result = CliRunner().invoke(app, ["jobs", "--prediction-error", "--data", str(data)])
    assert (result.exit_code, result.stdout.split()[-1]) == (0, "0"), result.output


def test_a_table_shows_square_brackets(data: Path):
    call = ["users", "create", "ada@example.com", "--name", "[bold]", "--data", str(data)]
    assert CliRunner().invoke(app, call).exit_code == 0
    assert "[bold]" in CliRunner().invoke(app, ["users", "list", "--data", str(data)]).stdout
