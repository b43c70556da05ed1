"""The models behind each build step, one class per kind of model, behind small contracts."""
