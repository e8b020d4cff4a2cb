"""Recommendations: `python -m efficientllm.recommend` names the technique for a model, a device and limits.

`request` is what was asked, `techniques` what could answer, `evidence` what reports say of it, `planned_training` and
`planned_serving` what it would cost, `search` the choice, `answer` its text.
"""
