"""SQLite: connection, transactions, migrations and backup. Knows no domain."""
