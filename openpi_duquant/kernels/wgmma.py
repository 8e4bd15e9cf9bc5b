"""The instruction of Hopper's tensor cores as a function of CUDA C++: too many operands to write down."""


def multiply(number: str, sums: int, kind: str, flags: str = "", *, in_registers: bool = True) -> str:
    """The source of `multiply(sums, a, b)`, which adds products of a and b to sums. b is described, see numbers.cuh.

    Args:
        number: The type of a sum: "int" or "float".
        sums: That a thread has.
        kind: Shape and types: "m64n64k16.f32.bf16.bf16".
        flags: What the instruction is told of its operands, if anything: ", 1, 1, 0, 0".
        in_registers: Whether a is in four registers; else it is described too.
    """
    constraint, lefts = "r" if number == "int" else "f", 4 if in_registers else 1
    results, left = (", ".join(f"%{first + i}" for i in range(many)) for first, many in ((0, sums), (sums, lefts)))
    outputs = ", ".join(f'"+{constraint}"(sums[{i}])' for i in range(sums))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if in_registers else '"l"(a)'
    a = "const unsigned (&a)[4]" if in_registers else "unsigned long long a"
    return f"""__device__ void multiply({number} (&sums)[{sums}], {a}, unsigned long long b) {{
    asm volatile("{{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.{kind} "
                 "{{{results}}}, {f"{{{left}}}" if in_registers else left}, %{sums + lefts}, add{flags}; }}"
                 : {outputs} : {inputs}, "l"(b));
}}
"""
