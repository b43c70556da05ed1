"""Inputs, outputs, schemas and nodes, with the checks that ComfyUI makes when it loads a node."""

import inspect
from typing import Any


class _Port:
    def __init__(self, id: str, display_name: str | None = None, optional: bool = False, tooltip: str | None = None):
        self.id, self.display_name, self.optional, self.tooltip = id, display_name, optional, tooltip


def _type(name: str, *widget: str) -> type:
    """Return a type whose `Input` and `Output` take the arguments that ComfyUI's take; `widget` names further ones."""

    class Input(_Port):
        io_type = name

        def __init__(self, id: str, display_name: Any = None, optional: bool = False, tooltip: Any = None, **more: Any):
            super().__init__(id, display_name, optional, tooltip)
            if unknown := set(more) - set(widget):
                raise TypeError(f"{name} inputs have no {sorted(unknown)}")
            self.more = more

    class Output(_Port):
        io_type = name

        def __init__(self, id: Any = None, display_name: Any = None, tooltip: Any = None, is_output_list: bool = False):
            super().__init__(id, display_name, False, tooltip)

    return type(name, (), {"Input": Input, "Output": Output, "io_type": name})


Image: Any = _type("IMAGE")
Int: Any = _type("INT", "default", "min", "max", "step", "control_after_generate")
Float: Any = _type("FLOAT", "default", "min", "max", "step", "round")
String: Any = _type("STRING", "default", "multiline", "placeholder", "dynamic_prompts")
Combo: Any = _type("COMBO", "default", "options", "control_after_generate")


def Custom(io_type: str) -> Any:
    return _type(io_type)


class Schema:
    def __init__(
        self, node_id: str, display_name: Any = None, category: str = "sd", inputs: Any = None, outputs: Any = None,
        hidden: Any = None, description: str = "", is_output_node: bool = False, not_idempotent: bool = False,
    ):  # fmt: skip
        self.node_id, self.display_name, self.category, self.description = node_id, display_name, category, description
        self.inputs, self.outputs, self.is_output_node = inputs or [], outputs or [], is_output_node

    def validate(self) -> None:
        ids = [port.id for port in (*self.inputs, *self.outputs)]
        if len(set(ids)) < len(ids):
            raise ValueError(f"ids are not unique: {ids}")


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: Any = None):
        self.args, self.ui = args, ui

    @property
    def result(self) -> Any:
        return self.args if self.args else None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class ComfyNode:
    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, **kwargs: Any) -> NodeOutput:
        raise NotImplementedError

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """Return the schema after the checks: a class method `execute` whose parameters are the inputs."""
        if not isinstance(inspect.getattr_static(cls, "execute"), classmethod):
            raise TypeError("execute must be a class method")
        schema = cls.define_schema()
        schema.validate()
        return schema
