"""The models that this project trains and records, as a recipe: ``python -m traces.reference STEP``.

`docs/reference_model.md` goes through the steps. Importing this package needs no torch; training and recording do.
"""
