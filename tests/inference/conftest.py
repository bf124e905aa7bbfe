from tests.inference.fixtures import config, video, weights  # noqa: F401, fixtures
