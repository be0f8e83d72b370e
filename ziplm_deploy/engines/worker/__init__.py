"""The process that runs an engine: files that need numpy and their engine only, for another interpreter's sake.

An engine is one page here, ``NAME_session.py``: ``FACTS`` (:class:`ziplm_deploy.engines.worker.facts.EngineFacts`) and
``Sessions``, whose ``load`` returns something with the methods of an ONNX Runtime session that the worker calls.
"""
