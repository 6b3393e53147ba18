//! The bytes of decision maps.

use msrgate_plan::{CompileOptions, DecisionMap};

use crate::agreement::plan_is_map;

pub(crate) fn check(bytes: &[u8]) {
    let Ok(map) = DecisionMap::from_bytes(bytes) else {
        return;
    };
    assert_eq!(map.to_bytes(), bytes);
    plan_is_map(&map, &CompileOptions::default());
}
