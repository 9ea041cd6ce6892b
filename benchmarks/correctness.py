"""Every kernel and hot path of every backend that can run here, against float64.

python benchmarks/correctness.py --device cuda --json correctness.json
"""

import collections
import dataclasses
import sys

import options
import refinenet_fast
from refinenet_fast import testing


def main():
    parser = options.Parser(description=__doc__.splitlines()[0])
    options.add_machine_options(parser)
    args = parser.parse_args()
    _, meta = options.set_up_machine(parser, args)
    meta["build"] = refinenet_fast.build_info()
    meta["backends"] = [dataclasses.asdict(info) for info in refinenet_fast.list_backends()]
    rows = testing.check_backends(args.device)
    if args.json:
        options.write_json(args.json, {"meta": meta, "rows": rows})
    checks = collections.Counter(row["backend"] for row in rows)
    wrong = [row for row in rows if not row["ok"]]
    for row in wrong:
        print("wrong:", ", ".join(f"{key} {value}" for key, value in row.items()))
    print(f"{len(rows)} checks ({', '.join(f'{b} {n}' for b, n in checks.items())})", end="")
    print(f", {len(wrong)} wrong")
    return int(bool(wrong) or not rows)


if __name__ == "__main__":
    sys.exit(main())
