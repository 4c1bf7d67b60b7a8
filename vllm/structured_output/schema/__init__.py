"""JSON schemas in a normal form that the engines of grammars can keep to the letter.

A schema's keywords meet in many ways: beside `$ref`, inside `allOf`, under `not`. The normal form has none of that. It
says of each value which types it may have and, for each type, a list of alternatives (`kinds`). `expand` makes it,
`document` finds what references name, `membership` tries values on it, and `emit` writes it down again as a small
schema whose keywords an engine knows.
"""
