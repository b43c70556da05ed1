"""The numbered changes of the tables, applied in order by Alembic."""
