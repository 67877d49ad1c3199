"""One sqlite store for the tests that bring no files: making its tables takes seconds."""

import mlflow
import pytest
from registering import client_of


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    client = client_of(tmp_path_factory.mktemp("store"))
    client.search_registered_models()  # makes the tables, once
    return client
