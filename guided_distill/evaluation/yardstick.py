"""What samples are measured with: a feature network, and the statistics of real images by it.

Both are made once and kept: the classifier, which is trained on the data set itself, and the statistics lie in the
directory that is given, and are made anew where they belong to other data or another network.
"""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill import distributed
from guided_distill.data import read_range, read_records
from guided_distill.errors import UserError
from guided_distill.evaluation import reference as references
from guided_distill.evaluation.features import FeatureNetwork, classifier_network, compute, load_feature_network
from guided_distill.evaluation.gaussians import frechet_distance, gaussian_stats, merge_gaussians
from guided_distill.evaluation.measure import measure
from guided_distill.evaluation.reference import Reference
from guided_distill.evaluation.samples import collect
from guided_distill.files import write_whole
from guided_distill.models import classifier

_CLASSIFIER_IMAGES = 50_000
_CHUNK, _CHUNK_BYTES = 5000, 2**29  # images that are decoded at a time, at most
_BATCH = {"classifier": 512}
_BATCH_OF_IMAGENET = 64
_NEIGHBOURS = 10_000  # real images whose features are kept, for precision, recall and the kernel distance


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """A feature network, and what its features of the real images are like."""

    network: FeatureNetwork
    reference: Reference
    test_accuracy: float | None = None  # of the classifier, on images that it was not trained on

    @property
    def provenance(self):
        """What a figure depends on besides the samples."""
        return {
            "feature_network": self.network.name,
            "weights_hash": self.network.weights_hash,
            "resize": self.network.resize,
            "reference": self.reference.source,
            "reference_hash": self.reference.hash,
        }


def make_yardsticks(experiment, dataset, directory, mesh, say) -> list[Yardstick]:
    """One for each of config.evaluate.features; `say` is told what takes long.

    Raises UserError where the weights of a network are missing, or config.evaluate.reference is not of these images, or
    of none of the networks.
    """
    config, given = experiment.evaluate, None
    if config.reference is not None:
        given = references.load(config.reference)
        if given.network not in config.features:
            raise UserError(
                f"config.evaluate.reference: {config.reference} is of {given.network}, and config.evaluate.features "
                f"names {', '.join(config.features)}"
            )
    found = []
    for name in config.features:
        network, accuracy = (
            _own_classifier(experiment, dataset, directory, say)
            if name == "classifier"
            else (load_feature_network(name), None)
        )
        reference = given
        if given is None or given.network != name:
            reference = _own_reference(network, experiment.data, dataset, directory, mesh, say)
        references.check(reference, **_of(network, experiment.data))
        found.append(Yardstick(network, reference, accuracy))
    return found


def provenance_of(yardsticks) -> dict[str, str]:
    """What figures by these depend on besides the samples: of several networks, one behind the other."""
    each = [yardstick.provenance for yardstick in yardsticks]
    return {key: "; ".join(one[key] for one in each) for key in each[0]}


def features_of(network, x, mesh):
    """(features f32[n,D], logits f32[n,K]) of samples f32[n,*S] in [-1, 1], on all devices of the mesh."""
    size = _BATCH.get(network.name, _BATCH_OF_IMAGENET)
    return compute(network, x, batch_size=-(-size // mesh.size) * mesh.size, mesh=mesh)


def measure_by(yardsticks, parts, seed, what):
    """What `measure` says by each of the yardsticks, as one; `parts` are the Samples of the batches for each.

    Raises UserError, naming `what`, where there are images twice or not at all, or features that are not finite.
    """
    found = {}
    for yardstick, batches in zip(yardsticks, parts, strict=True):
        name, theirs = yardstick.network.name, yardstick.network.labels_are_the_datas
        try:
            samples = collect(batches)
            found[name] = measure(samples, yardstick.reference, labels_are_the_datas=theirs, seed=seed)
        except ValueError as error:
            raise UserError(f"{what}, by {name}: {error}") from error
    merged = {"metrics": {}, "intervals": {}}
    for one in found.values():
        for key, values in merged.items():
            for name, value in one[key].items():
                values.setdefault(name, value)  # of figures that several give, the first network's count
    return merged | {
        "settings": {name: one["settings"] for name, one in found.items()},
        "notes": [note for one in found.values() for note in one["notes"]],
    }


def kept_rows(count):
    """The places of those real images, of `count`, whose features are kept."""
    return np.linspace(0, count - 1, min(count, _NEIGHBOURS)).astype(int)


def _of(network, data):
    resolution = "x".join(map(str, data.sample_shape))
    return {
        "network": network.name,
        "weights_hash": network.weights_hash,
        "resize": network.resize,
        "resolution": resolution,
    }


def _own_reference(network, data, dataset, directory, mesh, say):
    path = directory / f"reference_{network.name}.npz"
    source = f"{data.name}/{data.train_split} ({len(dataset.train)} images)"
    if distributed.agreed(path.exists):
        kept = references.load(path)
        if {key: getattr(kept, key) for key in _of(network, data)} == _of(network, data) and kept.source == source:
            return kept
    say(f"statistics of {source} by {network.name}")
    made = _reference_of(network, dataset.train, mesh, {"source": source, **_of(network, data)})
    if distributed.is_main():
        directory.mkdir(parents=True, exist_ok=True)
        references.save(path, made)
    return made


def _reference_of(network, images, mesh, texts):
    """Streams the images through the network: moments of all of them, the features of some at even distances."""
    count = len(images)
    kept = kept_rows(count)
    half = np.random.default_rng(0).permutation(count) % 2  # that an image is in, for the noise floor
    halves, rows = [None, None], []
    chunk = max(1, min(_CHUNK, _CHUNK_BYTES // read_range(images, 0, 1)["x"].nbytes))
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        features, _ = features_of(network, read_range(images, start, stop)["x"], mesh)
        for k in (0, 1):
            own = features[half[start:stop] == k]
            if len(own):
                part = gaussian_stats(own)
                halves[k] = part if halves[k] is None else merge_gaussians(halves[k], part)
        rows.append(features[kept[(kept >= start) & (kept < stop)] - start])
    try:
        floor = frechet_distance(*halves)
        return references.make_reference(merge_gaussians(*halves), np.concatenate(rows), noise_floor=floor, **texts)
    except (AttributeError, ValueError) as error:
        raise UserError(f"{texts['source']}: too few for statistics ({error}); take more than 5") from error


def _own_classifier(experiment, dataset, directory, say):
    """The classifier of the data set and its accuracy on the test split, trained where it is not there yet."""
    config, path = experiment.evaluate, directory / "classifier.safetensors"
    data = dataclasses.asdict(dataclasses.replace(experiment.data, data_dir=None))
    if not data["holdout"]:
        del data["holdout"]
    for key in ("text_length", "vocabulary"):  # the classifier tells labels apart, and sees no captions
        del data[key]
    made_with = {
        "data": data,
        "seed": config.seed,
        "updates": config.classifier_updates,
    }
    key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
    if distributed.agreed(path.exists):
        values, metadata = _read(path)
        if metadata.get("key") == key:
            return classifier_network(unflatten_dict(values, sep="/")), float(metadata["test_accuracy"])
    say("training the classifier that measures")
    params, accuracy = _train_classifier(config, dataset)
    params, accuracy = distributed.of_main(jax.device_get(params)), distributed.agreed(lambda: accuracy)
    if distributed.is_main():
        directory.mkdir(parents=True, exist_ok=True)
        values = {name: np.asarray(value) for name, value in flatten_dict(params, sep="/").items()}
        write_whole(path, safetensors.numpy.save(values, {"key": key, "test_accuracy": repr(accuracy)}))
    return classifier_network(params), accuracy


def _read(path):
    """(arrays by name, metadata) of a safetensors file."""
    content = path.read_bytes()
    try:
        values = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from error
    # safetensors itself reads them of local files alone: JSON, its length in eight bytes before it.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return values, header.get("__metadata__", {})


def _train_classifier(config, dataset):
    # An even share of a large set is enough to learn from; all of it is the reference.
    number = min(len(dataset.train), _CLASSIFIER_IMAGES)
    train = read_records(dataset.train, np.linspace(0, len(dataset.train) - 1, number).astype(int))
    test = read_records(dataset.test, range(min(len(dataset.test), _CLASSIFIER_IMAGES)))
    try:
        params = classifier.train_classifier(
            train["x"], train["label"], dataset.num_classes, seed=config.seed, updates=config.classifier_updates
        )
    except ValueError as error:
        raise UserError(f"the classifier that measures cannot be trained on {dataset.name}: {error}") from error
    return params, classifier.accuracy(params, test["x"], test["label"])
