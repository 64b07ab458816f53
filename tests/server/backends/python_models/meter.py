"""Metrics of its own, log lines, and readiness that a file decides."""

import os

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        pb_utils.Logger.log_info("ready to measure")
        family = pb_utils.MetricFamily(
            name="test_requests", description="Requests\nso far", kind=pb_utils.MetricFamily.COUNTER
        )
        self.requests = family.Metric(labels={"model": args["model_name"]})
        self.level = pb_utils.MetricFamily("test_level", "A level", pb_utils.MetricFamily.GAUGE).Metric()
        sizes = pb_utils.MetricFamily("test_sizes", "Sizes", pb_utils.MetricFamily.HISTOGRAM)
        self.sizes = sizes.Metric(labels={"kind": 'a "quoted" one'}, buckets=[1, 10.5])
        for wrong in (
            lambda: pb_utils.MetricFamily("test_level", "", pb_utils.MetricFamily.COUNTER),
            lambda: pb_utils.MetricFamily("no name", "", pb_utils.MetricFamily.COUNTER),
            lambda: self.requests.increment(-1),
            lambda: self.requests.set(3),
            lambda: self.sizes.value(),
            lambda: sizes.Metric(labels={"kind": "other"}),
        ):
            try:
                wrong()
            except pb_utils.TritonModelException:
                continue
            raise AssertionError("this must be refused")
        self.flag = os.path.join(args["model_repository"], "not_ready")

    def is_ready(self):
        return not os.path.exists(self.flag)

    def execute(self, requests):
        self.requests.increment(len(requests))
        self.level.set(2.5)
        self.level.increment(-1)
        for size in (1, 5, 50):
            self.sizes.observe(size)
        assert self.level.value() == 1.5
        pb_utils.Logger.log("measured", pb_utils.Logger.WARNING)
        return [pb_utils.InferenceResponse([]) for _ in requests]

    def finalize(self):
        pb_utils.Logger.log_error("finalized")
