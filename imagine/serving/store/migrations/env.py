"""Alembic runs this file to bring a database to the newest tables, with the connection that `database` hands over."""

from alembic import context

from imagine.serving.store.tables import metadata


def run() -> None:
    """Run all migrations that the database lacks, in one transaction."""
    context.configure(
        connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
    )
    with context.begin_transaction():
        context.run_migrations()


if __name__ == "env_py":  # the name under which Alembic loads this file
    run()
