"""What may stand in a JobSet of jobset.x-k8s.io/v1alpha2, and, of Jobs and pods, in one of ours.

A mapping names its keys, with "!" those that must be there, and under "*" what any other key holds; a list says what
each of its entries is; a set holds the values that are possible.
"""

TEXT, WHOLE, FLAG = str, int, bool
METADATA = {"name": TEXT, "annotations": {"*": TEXT}, "labels": {"*": TEXT}}
CONTAINER = {
    "name!": TEXT,
    "image": TEXT,
    "args": [TEXT],
    "command": [TEXT],
    "env": [{"name!": TEXT, "value": TEXT}],
    "ports": [{"containerPort!": WHOLE, "name": TEXT, "protocol": {"TCP", "UDP", "SCTP"}}],
    "resources": {"limits": {"*": (TEXT, WHOLE)}, "requests": {"*": (TEXT, WHOLE)}},
}
POD = {
    "containers!": [CONTAINER],
    "restartPolicy": {"Never", "OnFailure"},  # of a Job's; Always is for others
    "hostNetwork": FLAG,
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
    "nodeSelector": {"*": TEXT},
    "serviceAccountName": TEXT,
    "terminationGracePeriodSeconds": WHOLE,
}
POD_FAILURE_RULE = {
    "action!": {"Count", "FailIndex", "FailJob", "Ignore"},
    "onExitCodes": {"operator!": {"In", "NotIn"}, "values!": [WHOLE], "containerName": TEXT},
}
JOB = {
    "parallelism": WHOLE,
    "completions": WHOLE,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": WHOLE,
    "podFailurePolicy": {"rules!": [POD_FAILURE_RULE]},
    "template!": {"metadata": METADATA, "spec!": POD},
}
FAILURE_RULE = {
    "name!": TEXT,
    "action!": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [
        {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
    ],
    "targetReplicatedJobs": [TEXT],
}
REPLICATED_JOB = {
    "name!": TEXT,
    "groupName": TEXT,
    "replicas": WHOLE,
    "template!": {"metadata": METADATA, "spec!": JOB},
    "dependsOn": [{"name!": TEXT, "status!": {"Ready", "Complete"}}],
}
JOB_SET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": METADATA | {"name!": TEXT},
    "spec!": {
        "replicatedJobs": [REPLICATED_JOB],
        "network": {"enableDNSHostnames": FLAG, "publishNotReadyAddresses": FLAG, "subdomain": TEXT},
        "successPolicy": {"operator!": {"All", "Any"}, "targetReplicatedJobs": [TEXT]},
        "failurePolicy": {
            "maxRestarts": WHOLE,
            "restartStrategy": {"Recreate", "BlockingRecreate"},
            "rules": [FAILURE_RULE],
        },
        "startupPolicy": {"startupPolicyOrder!": {"AnyOrder", "InOrder"}},
        "coordinator": {"replicatedJob!": TEXT, "jobIndex": WHOLE, "podIndex": WHOLE},
        "suspend": FLAG,
        "managedBy": TEXT,
        "ttlSecondsAfterFinished": WHOLE,
    },
}


def faults(value, schema=JOB_SET, path="JobSet"):
    """Yields a line for each part of a document that a schema does not allow, or misses."""
    if isinstance(schema, dict) and isinstance(value, dict):
        known = {key.rstrip("!"): part for key, part in schema.items()}
        yield from (f"{path}: no {key[:-1]}" for key in schema if key.endswith("!") and key[:-1] not in value)
        for key, part in value.items():
            if key in known or "*" in known:
                yield from faults(part, known.get(key, known.get("*")), f"{path}.{key}")
            else:
                yield f"{path}: unknown key {key}"
    elif isinstance(schema, list) and isinstance(value, list):
        for k, part in enumerate(value):
            yield from faults(part, schema[0], f"{path}[{k}]")
    elif isinstance(schema, set):
        if value not in schema:
            yield f"{path} is {value!r}"
    elif isinstance(schema, dict | list) or type(value) not in (schema if isinstance(schema, tuple) else (schema,)):
        yield f"{path} is {value!r}"
