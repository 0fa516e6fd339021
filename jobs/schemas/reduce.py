"""Makes kuberay.json from KubeRay's definitions: what `ingot cluster check` holds Kubernetes files against.

    python jobs/schemas/reduce.py ray.io_rayclusters.yaml ray.io_rayjobs.yaml

The two files are `ray-operator/config/crd/bases` of https://github.com/ray-project/kuberay, under the Apache License
2.0, the text of which is in LICENSE beside this file. Of their 2.3 MB the result keeps types, enumerations, bounds and
required fields; unknown fields are refused, and parts that occur several times are written once.
"""

import collections
import json
import os
import sys

import yaml

KEPT = {"type", "enum", "required", "pattern", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength"}
SHORTEST = 150  # characters from which on a part is worth a name
NOTE = (
    "Reduced by reduce.py from the custom resource definitions of KubeRay (https://github.com/ray-project/kuberay), "
    "Apache License 2.0: descriptions and rules in CEL left out, unknown fields refused, equal parts shared."
)


def strict(schema: dict) -> dict:
    """An OpenAPI schema of Kubernetes as JSON Schema without descriptions, which refuses what it does not know."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **({"pattern": schema["pattern"]} if "pattern" in schema else {})}
    out = {key: value for key, value in schema.items() if key in KEPT}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            out[key] = strict(schema[key])
    if "properties" in schema:
        out["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if "additionalProperties" not in out and not schema.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    return out


def shared(roots: dict[str, dict]) -> dict:
    """The same schemas as one, with parts that occur more than once under a name in ``$defs``."""
    counts: collections.Counter[str] = collections.Counter()

    def count(part: object) -> None:
        if isinstance(part, dict):
            text = json.dumps(part, sort_keys=True)
            counts[text] += len(text) >= SHORTEST
            if counts[text] < 2:
                for inner in part.values():
                    count(inner)

    for root in roots.values():
        count(root)
    names: dict[str, str] = {}
    parts: dict[str, dict] = {}

    def named(part: object, hint: str) -> object:
        if not isinstance(part, dict):
            return part
        text = json.dumps(part, sort_keys=True)
        if counts[text] < 2:
            return inside(part, hint)
        if text not in names:
            taken = sum(name.rstrip("0123456789") == hint for name in parts)
            names[text] = name = f"{hint}{taken + 1}" if taken else hint
            parts[name] = {}
            parts[name] = inside(part, hint)
        return {"$ref": f"#/$defs/{names[text]}"}

    def inside(part: dict, hint: str) -> dict:
        return {
            key: {name: named(field, name) for name, field in value.items()}
            if key == "properties"
            else named(value, hint)
            for key, value in part.items()
        }

    kinds = {kind: inside(root, kind) for kind, root in roots.items()}
    return {"$comment": NOTE, "$defs": {**parts, **kinds}}


def main() -> None:
    """Write kuberay.json beside this file."""
    roots = {}
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            definition = yaml.load(file, yaml.CSafeLoader)
        (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"].pop("status", None)
        root = roots[definition["spec"]["names"]["kind"]] = strict(schema)
        root["properties"]["metadata"] = {"type": "object"}
        root["required"] = ["apiVersion", "kind", "metadata", "spec"]
    with open(os.path.join(os.path.dirname(__file__), "kuberay.json"), "w", encoding="utf-8") as file:
        json.dump(shared(roots), file, sort_keys=True, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
