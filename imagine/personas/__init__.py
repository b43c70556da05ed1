"""Persona files: the consent that they record, their encryption, and how they are listed and deleted.

`imagine.people.persona` makes personas; the modules here need neither torch nor a network.
"""
