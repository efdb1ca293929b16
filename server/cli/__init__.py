"""Plantain, a self-hosted inference server: serve, and administer models, users and data."""

import typer

from server.cli import backup, devices, doctor, reports, serve, users, weights

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, help=__doc__)

for commands in (serve, weights, users, reports, backup, doctor, devices):
    commands.register(app)
