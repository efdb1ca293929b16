"""The command line: `plantain serve`, and what an operator looks at or changes."""

import typer

from server.commands import accounts, backup, books, devices, doctor, jobs, serve, users_import, users_password, weights

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, help=__doc__)

for commands in (serve, weights, accounts, books, jobs, users_import, users_password, backup, doctor, devices):
    commands.register(app)

if __name__ == "__main__":
    app()
