//! The bytes of decision maps.

use msrgate_plan::{CompileOptions, DecisionMap};

use crate::agreement::plan_is_map;

pub(crate) fn check(bytes: &[u8]) {
    let Ok(map) = DecisionMap::from_bytes(bytes) else {
        return;
    };
    let again = DecisionMap::from_bytes(&map.to_bytes()).expect("a map that was written");
    assert_eq!(again, map);
    assert_eq!(again.hash(), map.hash());
    plan_is_map(&map, &CompileOptions::default());
}
