"""Stand-ins for LIBERO's assets: coloured boxes, an open box for a basket and a plain floor, enough for libero_object.

Everything is authored here: shapes, numbers and XML. LIBERO supplies the rest (robot, tasks, initial states, control,
success predicates). What runs on stand-ins is a test of the machinery and never a LIBERO result.
"""

import argparse
import pathlib

from PIL import Image

from openpi_duquant.libero.simulator import STAND_IN_MARKER

FLOOR = -0.035
"""Height of the floor, m: LIBERO's initial states put things a centimetre above it."""

# Half extents along x, y and z of the object's own frame, m, and its colour. The tasks stand some objects on their
# y axis and some on their z axis; that half extent is a little less than their height in the initial states.
BOXES = {
    "alphabet_soup": ((0.020, 0.038, 0.020), "0.85 0.20 0.15"),
    "cream_cheese": ((0.034, 0.019, 0.023), "0.35 0.55 0.90"),
    "salad_dressing": ((0.019, 0.056, 0.019), "0.55 0.75 0.30"),
    "bbq_sauce": ((0.018, 0.018, 0.056), "0.45 0.20 0.10"),
    "ketchup": ((0.019, 0.056, 0.019), "0.90 0.10 0.10"),
    "tomato_sauce": ((0.021, 0.038, 0.021), "0.95 0.40 0.20"),
    "butter": ((0.034, 0.018, 0.018), "0.95 0.85 0.35"),
    "milk": ((0.021, 0.057, 0.021), "0.95 0.95 0.95"),
    "chocolate_pudding": ((0.036, 0.020, 0.024), "0.40 0.25 0.20"),
    "orange_juice": ((0.021, 0.057, 0.021), "1.00 0.60 0.10"),
}
BASKET_HALF, BASKET_DEPTH, WALL = 0.085, 0.04, 0.004
"""Half width of the basket, half its height, half the thickness of its walls, m."""

SCENE = f"""<mujoco model="stand-in floor">
  <asset>
    <texture builtin="gradient" height="64" rgb1="0.7 0.8 0.9" rgb2="0.3 0.4 0.5" type="skybox" width="64"/>
    <texture file="../textures/floor.png" name="texplane" type="2d"/>
    <texture file="../textures/wall.png" name="tex-wall" type="2d"/>
    <material name="plain-floor" texture="texplane" texrepeat="4 4"/>
  </asset>
  <worldbody>
    <light diffuse="0.9 0.9 0.9" dir="0 -0.2 -1" directional="true" pos="0 0 3"/>
    <body name="floor" pos="0 0 {FLOOR}">
      <geom friction="1 0.01 0.001" group="1" material="plain-floor" name="floor" size="3 3 0.1" type="plane"/>
    </body>
  </worldbody>
</mujoco>
"""


def _geom(half: tuple[float, ...], colour: str, position: tuple[float, ...] = (0, 0, 0), density: int = 300) -> str:
    """A box that collides (group 0) and shows (group 1)."""
    shape = f'pos="{" ".join(map(str, position))}" size="{" ".join(map(str, half))}" type="box"'
    return (
        f'<geom {shape} density="{density}" friction="1.5 0.02 0.001" group="0" rgba="0 0 0 0"/>\n'
        f'<geom {shape} conaffinity="0" contype="0" group="1" mass="0" rgba="{colour} 1"/>\n'
    )


def _object(name: str, geoms: str, half: tuple[float, ...], sites: str = "") -> str:
    """An object as robosuite reads them: geoms in a body "object", and sites for its extent."""
    up = max(half)
    return f"""<mujoco model="{name}">
  <worldbody><body>
    <body name="object">{geoms}{sites}</body>
    <site name="bottom_site" pos="0 0 {-up}" rgba="0 0 0 0" size="0.002"/>
    <site name="top_site" pos="0 0 {up}" rgba="0 0 0 0" size="0.002"/>
    <site name="horizontal_radius_site" pos="{up / 2} {up / 2} 0" rgba="0 0 0 0" size="0.002"/>
  </body></worldbody>
</mujoco>
"""


def _basket() -> str:
    half, depth, colour = BASKET_HALF, BASKET_DEPTH, "0.60 0.45 0.25"
    geoms = _geom((half, half, WALL), colour, (0, 0, WALL - depth), density=2000)
    for sign in (-1, 1):
        geoms += _geom((WALL, half, depth), colour, (sign * (half - WALL), 0, 0), density=2000)
        geoms += _geom((half - 2 * WALL, WALL, depth), colour, (0, sign * (half - WALL), 0), density=2000)
    inside = f"{half - 2 * WALL} {half - 2 * WALL} {depth}"
    site = f'<site name="contain_region" pos="0 0 {WALL}" quat="1 0 0 0" rgba="0 0 0 0" size="{inside}" type="box"/>'
    return _object("basket", geoms, (half, half, depth), site)


def make_standin_assets(folder: pathlib.Path) -> pathlib.Path:
    """Writes the tree that LIBERO looks for; returns the folder."""
    files = {"scenes/libero_floor_base_style.xml": SCENE, "stable_scanned_objects/basket/basket.xml": _basket()}
    for name, (half, colour) in BOXES.items():
        files[f"stable_hope_objects/{name}/{name}.xml"] = _object(name, _geom(half, colour), half)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "textures").mkdir()
    for name, colour in (("light-gray-floor-tile", (170, 170, 170)), ("light-gray-plaster", (200, 200, 200))):
        Image.new("RGB", (8, 8), colour).save(folder / "textures" / f"{name}.png")
    (folder / STAND_IN_MARKER).write_text(f"{__doc__}\n")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write stand-ins for LIBERO's assets.")
    parser.add_argument("folder", type=pathlib.Path)
    make_standin_assets(parser.parse_args().folder)
