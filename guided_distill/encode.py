"""--mode=encode: pictures and captions as latents, once, so that training needs neither autoencoder nor text encoder.

Every shard is written under a temporary name and renamed, and latents.json comes last: the same command continues an
interrupted one. Process p of P writes every P-th shard.
"""

import concurrent.futures
import dataclasses
import json
import sys

import jax
import numpy as np
import safetensors.numpy
from rich.progress import Progress

from guided_distill import data, distributed, latents, masks, pairs
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.files import read_json, write_json
from guided_distill.latent_space import frozen_hash, open_space
from guided_distill.tfds_files import open_set, open_split

_SHARD = 1024  # records
_CHUNK = 64  # pictures that are decoded and encoded at a time


def encode(config, source):
    """Encodes the pictures of `source` into the folder that config.data.name = "latents:DIR" names.

    `source` is "folder:DIR" (files or webdataset shards, see `pairs.open_pairs`) or the name of a prepared TFDS set,
    whose splits and held-out records are those of config.data. Pictures are cut and resized to what the config's latent
    is of. Raises UserError for a config without a latent model, and a folder begun with other settings.
    """
    experiment = from_config(config)
    folder, space = _folder(experiment), open_space(_latent_model(experiment))
    splits = _splits(experiment.data, source, _side(experiment, space))
    about = _about(experiment, space, source, splits)
    distributed.agreed(lambda: _begin(folder, about))
    if not folder.is_dir():
        raise UserError(f"{folder}: process 0 made it, and this one does not see it; all need storage that they share")
    todo = _todo(folder, about)
    mine = [shard for i, shard in enumerate(todo) if i % jax.process_count() == jax.process_index()]
    records, cut = sum(stop - start for *_, start, stop in mine), 0
    with Progress(disable=not distributed.is_main()) as progress:
        task = progress.add_task("encoding", total=records)
        for split, k, start, stop in mine:
            path = latents.shard_path(folder, split, k, about.shards[split])
            made = _records(experiment, space, splits[split], about, range(start, stop))
            cut += _write_shard(path, made, lambda: progress.advance(task))
    cut = distributed.total(cut)  # waits for the others
    if missing := _todo(folder, about):
        raise UserError(f"{folder}: {len(missing)} shards are missing; give the same command again, and it goes on")
    if distributed.is_main():
        write_json(folder / latents.ABOUT, dataclasses.asdict(about))
        (folder / latents.UNFINISHED).unlink(missing_ok=True)
        counts = ", ".join(f"{count:,} {split}" for split, count in about.counts.items())
        print(f"{folder}: {counts} latents of {source}", file=sys.stderr)
        if cut:
            what = "captions encoded now that are longer than the text encoder takes, which lost their end"
            print(f"{what}: {cut:,}", file=sys.stderr)


def _folder(experiment):
    name = experiment.data.name
    if not name.startswith(latents.PREFIX):
        raise UserError(f"config.data.name is {name!r}; --mode=encode writes to 'latents:DIR', a folder you name there")
    return latents.local(name.removeprefix(latents.PREFIX))


def _latent_model(experiment):
    if experiment.latent_model is None:
        raise UserError("config.latent_model is missing: the folder that --mode=import wrote, which does the encoding")
    return experiment.latent_model


def _side(experiment, space):
    """Side of the square pictures whose latents the config is for."""
    shape = experiment.data.sample_shape
    if len(shape) != 3 or shape[0] != shape[1] or shape[2] != space.channels:
        raise UserError(
            f"config.data.shape is {shape}; latents of {space.folder} have {space.channels} channels and two equal "
            "sides"
        )
    return space.picture_shape(shape)[0]


def _splits(config, source, side):
    """{"train": records, "test": records} of the source, squares of `side`."""
    if source.startswith(pairs.PREFIX):
        folder = source.removeprefix(pairs.PREFIX)
        whole = pairs.open_pairs(folder, side, captioned=bool(config.text_length))
        if not config.holdout:
            return {"train": whole, "test": None}
        train, test = data.held_out(whole, config.holdout)
        return {"train": train, "test": test}
    builder, wanted = open_set(source, config.data_dir), "text" if config.text_length else "label"
    if not {"image", wanted} <= set(builder.info.features):
        features = ", ".join(builder.info.features)
        raise UserError(f"--source={source} has the features {features}, not image and {wanted}")
    opened = {
        split: pairs.ResizedRecords(open_split(builder, source, key, getattr(config, key)), side, 3)
        for split, key in (("train", "train_split"), ("test", "test_split"))
        if split == "train" or not config.holdout
    }
    if config.holdout:
        train, test = data.held_out(opened["train"], config.holdout)
        return {"train": train, "test": test}
    return opened


def _about(experiment, space, source, splits):
    text, null_text = None, None
    if experiment.data.text_length:
        null = space.embed([""])[0]
        text, null_text = null.shape, [float(value) for value in null.reshape(-1)]
        _check_text(experiment, text)
    counts = {split: 0 if records is None else len(records) for split, records in splits.items()}
    return latents.About(
        shape=experiment.data.sample_shape,
        source=source,
        model_hash=frozen_hash(space.folder),
        posterior=space.posterior,
        flips=experiment.data.flip,
        text=text,
        null_text=null_text,
        inpainting=getattr(experiment.model, "extra_channels", 0) > 0,
        num_classes=experiment.data.num_classes,
        counts=counts,
        shards={split: -(-count // _SHARD) for split, count in counts.items()},
    )


def _check_text(experiment, text):
    wanted = experiment.data.text_length, getattr(experiment.model, "context_dim", text[1])
    if tuple(text) != wanted:
        raise UserError(
            f"the text encoder of {experiment.latent_model} gives {text[0]} x {text[1]} for a caption; "
            f"config.data.text_length and config.model.context_dim say {wanted[0]} x {wanted[1]}"
        )


def _begin(folder, about):
    """Notes what the set is made with; a set begun in another way is left alone."""
    said = json.loads(json.dumps(dataclasses.asdict(about)))
    for name in (latents.ABOUT, latents.UNFINISHED):
        if (folder / name).exists():
            theirs = read_json(folder / name)
            # What the model makes of no words may differ in its last bits on another machine.
            differing = sorted(key for key in said if key != "null_text" and theirs.get(key) != said[key])
            if differing:
                raise UserError(
                    f"{folder} was made with another {', '.join(differing)}; delete it, or name another folder"
                )
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / latents.UNFINISHED, said)


def _todo(folder, about):
    """(split, k, start, stop) of the shards that are not there, the same on every process."""

    def find():
        return [
            [split, k, k * _SHARD, min((k + 1) * _SHARD, count)]
            for split, count in about.counts.items()
            for k in range(about.shards[split])
            if not latents.shard_path(folder, split, k, about.shards[split]).exists()
        ]

    return distributed.agreed(find)


def _write_shard(path, records, advance):
    """Writes what `_records` yields; returns how many captions were cut."""
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(f"{path.name}.incomplete")
    writer, shortened = ArrayRecordWriter(str(temporary), "group_size:1"), 0
    for record, too_long in records:
        writer.write(record)
        shortened += too_long
        advance()
    writer.close()
    temporary.rename(path)
    return shortened


def _records(experiment, space, source, about, indices):
    """(the record as bytes, whether its caption was cut) of some pictures."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for chunk in _chunks(indices):
            found = list(pool.map(source.__getitem__, chunk))
            yield from _encoded(experiment, space, about, chunk, found)


def _chunks(indices):
    return [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]


def _encoded(experiment, space, about, indices, found):
    images = np.stack([record["image"] for record in found]).astype(np.float32) / 127.5 - 1.0
    fields = _latent_fields(experiment, space, about, indices, images, "")
    if about.flips:
        fields |= _latent_fields(experiment, space, about, indices, images[:, :, ::-1], latents.FLIPPED)
    cut = [False] * len(found)
    if about.text is not None:
        captions = [record["text"] for record in found]
        fields["text"], cut = space.embed(captions).astype(np.float16), space.too_long(captions)
    for i, record in enumerate(found):
        if about.text is None and not 0 <= record["label"] < about.num_classes:
            raise UserError(
                f"data.num_classes: label {record['label']} of picture {indices[i]} of {about.source} is outside "
                f"0..{about.num_classes - 1}"
            )
        own = {name: np.ascontiguousarray(values[i]) for name, values in fields.items()}
        own["label"] = np.array([record["label"] if about.text is None else 0], np.int32)
        own["caption"] = np.frombuffer(record["text"].encode(), np.uint8)
        yield safetensors.numpy.save(own), cut[i]


def _latent_fields(experiment, space, about, indices, images, suffix):
    mean, std = space.moments(images)
    fields = {"mean": mean.astype(np.float16)}
    if about.posterior:
        fields["std"] = std.astype(np.float16)
    if about.inpainting:
        # By the picture's place, so that a set is the same on any number of hosts.
        seeds = [(int(i), bool(suffix), experiment.seed) for i in indices]
        side = images.shape[1]
        holes = np.stack([masks.draw_mask(np.random.default_rng(seed), side) for seed in seeds])
        fields |= {"mask": masks.shrink(holes, mean.shape[1]), "masked": space.encode(images * (1 - holes))}
        fields["masked"] = fields["masked"].astype(np.float16)
    return {name + suffix: values for name, values in fields.items()}
