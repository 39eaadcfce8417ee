"""Adapters to other libraries, each a module of its own that alone imports its library.

``schedulers`` holds drop-in schedulers for the pipelines of diffusers, ``diffusers_models`` and
``openai_models`` read the checkpoints of diffusers and of OpenAI's two repositories.
"""
