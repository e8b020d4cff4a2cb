"""Functions that the yaml files of tasks name: the harness looks for them beside a file."""

from efficientllm.evaluation.answers import documents, images, judge

__all__ = ["documents", "images", "judge"]
