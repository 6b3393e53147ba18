//! Values of C: constant expressions, and variables and arrays of integers.

use std::collections::HashMap;

use msrgate_core::abi;

use super::cursor::Cursor;
use super::token::{Kind, Macros};
use crate::database;
use crate::raw::RawError;

/// The most bytes that all variables of a text may take.
const MOST_BYTES: usize = 1 << 22;

/// How deep brackets and macros may go.
const DEEPEST: u32 = 64;

/// A variable or an array of integers.
pub(super) struct Object {
    /// Its memory.
    pub(super) bytes: Vec<u8>,
    /// Bytes of one integer.
    width: usize,
    /// Bytes of what one index is for.
    stride: usize,
}

/// Bytes of an integer type; `None` for what is no integer type.
pub(super) fn width(words: &[&str]) -> Option<usize> {
    let mut width = None;
    for word in words {
        let found = match *word {
            "static" | "const" | "volatile" | "register" | "extern" | "signed" | "__aligned" | "aligned" => continue,
            "unsigned" | "int" | "uint32_t" | "int32_t" | "__u32" | "__s32" | "u32" => width.unwrap_or(4),
            "char" | "bool" | "uint8_t" | "int8_t" | "__u8" | "__s8" | "u8" => 1,
            "short" | "uint16_t" | "int16_t" | "__u16" | "__s16" | "u16" => 2,
            "long" | "size_t" | "uint64_t" | "int64_t" | "__u64" | "__s64" | "u64" => 8,
            _ => return None,
        };
        width = Some(found);
    }
    width
}

/// All that is known by name.
pub(super) struct Objects {
    macros: Macros,
    objects: HashMap<String, Object>,
    bytes: usize,
}

impl Objects {
    pub(super) fn new(macros: Macros) -> Objects {
        Objects {
            macros,
            objects: HashMap::new(),
            bytes: 0,
        }
    }

    pub(super) fn knows(&self, name: &str) -> bool {
        self.objects.contains_key(name)
    }

    pub(super) fn get(&self, name: &str) -> Option<&Object> {
        self.objects.get(name)
    }

    pub(super) fn insert(&mut self, name: &str, object: Object) {
        self.objects.insert(name.to_owned(), object);
    }

    /// What follows the name in a declaration: brackets, and an initialiser. Without one it is zero, as static
    /// variables are.
    pub(super) fn declared(&mut self, cursor: &mut Cursor<'_>, width: usize) -> Result<Object, RawError> {
        let mut object = self.array(cursor, width)?;
        if cursor.take("=") {
            if object.stride != width && object.stride != 0 {
                return Err(cursor.error("an array of arrays is zero here, or filled by assignments".to_owned()));
            }
            self.initialise(cursor, &mut object)?;
        }
        if object.stride == 0 {
            // `x[]` or a single value; either way an index is for one integer.
            object.stride = width;
        }
        Ok(object)
    }

    /// `[]) { … }` of a compound literal.
    pub(super) fn literal(&mut self, cursor: &mut Cursor<'_>, width: usize) -> Result<Object, RawError> {
        let mut object = self.array(cursor, width)?;
        cursor.want(")")?;
        self.initialise(cursor, &mut object)?;
        Ok(object)
    }

    /// Brackets: as many integers as they say. `stride` is 0 where they leave it to the initialiser.
    fn array(&mut self, cursor: &mut Cursor<'_>, width: usize) -> Result<Object, RawError> {
        let mut lengths: Vec<usize> = Vec::new();
        let mut open = false;
        while cursor.take("[") {
            if lengths.is_empty() && cursor.take("]") {
                open = true;
                break;
            }
            let length = self.number(cursor)?;
            cursor.want("]")?;
            let length = usize::try_from(length).ok().filter(|length| *length <= MOST_BYTES);
            lengths.push(length.ok_or_else(|| cursor.error("the array is too large for bitmaps".to_owned()))?);
        }
        let size = lengths.iter().try_fold(width, |size, length| size.checked_mul(*length));
        let size = if open { Some(0) } else { size };
        let first = lengths.first().copied().unwrap_or(1).max(1);
        let size = size.filter(|size| self.bytes + size <= MOST_BYTES);
        let size = size.ok_or_else(|| cursor.error("the array is too large for bitmaps".to_owned()))?;
        self.bytes += size;
        Ok(Object {
            bytes: vec![0; size],
            width,
            stride: if open { 0 } else { size / first },
        })
    }

    fn initialise(&mut self, cursor: &mut Cursor<'_>, object: &mut Object) -> Result<(), RawError> {
        let open = object.stride == 0;
        if let Some(Kind::Text(text)) = cursor.peek() {
            cursor.at += 1;
            let bytes = text.iter().copied().chain(open.then_some(0));
            return bytes
                .enumerate()
                .try_for_each(|(at, byte)| self.put(cursor, object, open, at, byte.into()));
        }
        if !cursor.take("{") {
            let value = self.number(cursor)?;
            return self.put(cursor, object, open, 0, value);
        }
        let mut at = 0;
        while !cursor.take("}") {
            let mut last = at;
            if cursor.take("[") {
                at = self.index(cursor)?;
                last = at;
                if cursor.take("...") {
                    last = self.index(cursor)?;
                }
                cursor.want("]")?;
                cursor.want("=")?;
            }
            let value = self.number(cursor)?;
            for at in at..=last {
                self.put(cursor, object, open, at, value)?;
            }
            at = last + 1;
            if !cursor.take(",") {
                return cursor.want("}");
            }
        }
        Ok(())
    }

    fn index(&mut self, cursor: &mut Cursor<'_>) -> Result<usize, RawError> {
        let index = self.number(cursor)?;
        let index = usize::try_from(index).ok().filter(|index| *index <= MOST_BYTES);
        index.ok_or_else(|| cursor.error("the index is too large for bitmaps".to_owned()))
    }

    /// Stores an integer, as C converts it; an open array grows.
    fn put(
        &mut self,
        cursor: &Cursor<'_>,
        object: &mut Object,
        grows: bool,
        at: usize,
        value: u64,
    ) -> Result<(), RawError> {
        let end = (at + 1) * object.width;
        if grows && object.bytes.len() < end && self.bytes + end <= MOST_BYTES {
            self.bytes += end - object.bytes.len();
            object.bytes.resize(end, 0);
        }
        let place = object.bytes.get_mut(at * object.width..end);
        let place = place.ok_or_else(|| cursor.error("more is put into the array than it holds".to_owned()))?;
        for (byte, from) in place.iter_mut().zip(value.to_le_bytes()) {
            *byte = from;
        }
        Ok(())
    }

    /// `[3] = 0xff;` or `|= 1;` behind a name.
    pub(super) fn assign(&mut self, name: &str, cursor: &mut Cursor<'_>) -> Result<(), RawError> {
        let offset = self.offset(name, cursor)?;
        let operator = match cursor.peek() {
            Some(Kind::Sign(sign @ ("|" | "&" | "^"))) => {
                cursor.at += 1;
                Some(*sign)
            }
            _ => None,
        };
        cursor.want("=")?;
        let value = self.number(cursor)?;
        let Some(mut object) = self.objects.remove(name) else {
            return Err(cursor.error(format!("`{name}` is not declared here")));
        };
        let place = object.bytes.get(offset..).unwrap_or_default();
        let mut bytes = [0; 8];
        bytes
            .iter_mut()
            .zip(place.iter().take(object.width))
            .for_each(|(byte, from)| *byte = *from);
        let before = u64::from_le_bytes(bytes);
        let value = match operator {
            Some("|") => before | value,
            Some("&") => before & value,
            Some(_) => before ^ value,
            None => value,
        };
        let at = offset.checked_div(object.width).unwrap_or(0);
        let put = self.put(cursor, &mut object, false, at, value);
        self.objects.insert(name.to_owned(), object);
        put
    }

    /// How far into a variable the brackets behind its name lead.
    pub(super) fn offset(&mut self, name: &str, cursor: &mut Cursor<'_>) -> Result<usize, RawError> {
        let mut offset = 0usize;
        let (mut stride, width) = self
            .objects
            .get(name)
            .map_or((1, 1), |object| (object.stride, object.width));
        loop {
            let scaled = match cursor.peek() {
                Some(Kind::Sign("[")) => {
                    cursor.at += 1;
                    let index = self.index(cursor)?;
                    cursor.want("]")?;
                    let scaled = index.checked_mul(stride);
                    stride = width;
                    scaled
                }
                Some(Kind::Sign("+")) => {
                    cursor.at += 1;
                    self.index(cursor)?.checked_mul(stride)
                }
                _ => return Ok(offset),
            };
            let sum = scaled.and_then(|scaled| offset.checked_add(scaled));
            offset = sum.ok_or_else(|| cursor.error("the index is too large for bitmaps".to_owned()))?;
        }
    }

    /// memset of a whole variable.
    pub(super) fn fill(&mut self, name: &str, byte: u64, length: u64) -> Result<(), String> {
        let object = self
            .objects
            .get_mut(name)
            .ok_or_else(|| format!("`{name}` is not declared here"))?;
        let place = usize::try_from(length)
            .ok()
            .and_then(|length| object.bytes.get_mut(..length));
        let place = place.ok_or_else(|| format!("memset of `{name}` goes beyond its end"))?;
        place.fill(byte.to_le_bytes().first().copied().unwrap_or(0));
        Ok(())
    }

    /// A constant expression, in 64 bits.
    pub(super) fn number(&self, cursor: &mut Cursor<'_>) -> Result<u64, RawError> {
        self.binary(cursor, 0, 0)
    }

    fn binary(&self, cursor: &mut Cursor<'_>, weakest: u8, depth: u32) -> Result<u64, RawError> {
        let mut left = self.unary(cursor, depth)?;
        while let Some(Kind::Sign(sign)) = cursor.peek() {
            let strength = match *sign {
                "|" => 1,
                "^" => 2,
                "&" => 3,
                "<<" | ">>" => 4,
                "+" | "-" => 5,
                "*" | "/" | "%" => 6,
                _ => break,
            };
            // `x |= 1` is an assignment and no sum.
            if strength <= weakest || matches!(cursor.ahead(1), Some(Kind::Sign("="))) {
                break;
            }
            cursor.at += 1;
            let right = self.binary(cursor, strength, depth)?;
            let shift = u32::try_from(right).unwrap_or(u32::MAX);
            let value = match *sign {
                "|" => Some(left | right),
                "^" => Some(left ^ right),
                "&" => Some(left & right),
                "<<" => left.checked_shl(shift),
                ">>" => left.checked_shr(shift),
                "+" => Some(left.wrapping_add(right)),
                "-" => Some(left.wrapping_sub(right)),
                "*" => Some(left.wrapping_mul(right)),
                "/" => left.checked_div(right),
                _ => left.checked_rem(right),
            };
            left = value.ok_or_else(|| cursor.error(format!("`{sign}` by {right} has no value")))?;
        }
        Ok(left)
    }

    fn unary(&self, cursor: &mut Cursor<'_>, depth: u32) -> Result<u64, RawError> {
        let depth = depth + 1;
        if depth > DEEPEST {
            return Err(cursor.error("brackets or macros go too deep".to_owned()));
        }
        match cursor.next() {
            Some(Kind::Number(number)) => Ok(*number),
            Some(Kind::Sign("~")) => Ok(!self.unary(cursor, depth)?),
            Some(Kind::Sign("-")) => Ok(self.unary(cursor, depth)?.wrapping_neg()),
            Some(Kind::Sign("+")) => self.unary(cursor, depth),
            Some(Kind::Sign("(")) => {
                let mut ahead = cursor.clone();
                let mut words: Vec<&str> = Vec::new();
                while let Some(Kind::Word(word)) = ahead.peek() {
                    words.push(word);
                    ahead.at += 1;
                }
                match width(&words) {
                    Some(width) if ahead.take(")") => {
                        *cursor = ahead;
                        let value = self.unary(cursor, depth)?;
                        let bits = 64 - 8 * u32::try_from(width).unwrap_or(8);
                        Ok(value << bits >> bits)
                    }
                    _ => {
                        let value = self.binary(cursor, 0, depth)?;
                        cursor.want(")")?;
                        Ok(value)
                    }
                }
            }
            Some(Kind::Word(word)) if word == "sizeof" => self.size(cursor),
            Some(Kind::Word(word)) => self.named(cursor, word, depth),
            _ => {
                cursor.at -= 1;
                Err(cursor.error(format!("a number is missing{}", cursor.before())))
            }
        }
    }

    /// `sizeof x` or `sizeof(x)`, of a variable.
    fn size(&self, cursor: &mut Cursor<'_>) -> Result<u64, RawError> {
        let bracket = cursor.take("(");
        let name = cursor.word()?;
        let object = self.objects.get(name);
        let object = object.ok_or_else(|| cursor.error(format!("the size of `{name}` is not known here")))?;
        if bracket {
            cursor.want(")")?;
        }
        Ok(object.bytes.len() as u64)
    }

    fn named(&self, cursor: &mut Cursor<'_>, name: &str, depth: u32) -> Result<u64, RawError> {
        if let Some(tokens) = self.macros.get(name) {
            let mut inner = Cursor { tokens, at: 0 };
            let value = self.binary(&mut inner, 0, depth)?;
            return match inner.peek() {
                None => Ok(value),
                Some(_) => Err(inner.error(format!("`{name}` is no number"))),
            };
        }
        let known = match name {
            "KVM_MSR_FILTER_READ" => Some(1),
            "KVM_MSR_FILTER_WRITE" => Some(2),
            "KVM_MSR_FILTER_RANGE_VALID_MASK" => Some(3),
            "KVM_MSR_FILTER_DEFAULT_ALLOW" => Some(0),
            "KVM_MSR_FILTER_DEFAULT_DENY" | "KVM_MSR_FILTER_VALID_MASK" => Some(u64::from(abi::FILTER_DEFAULT_DENY)),
            "KVM_MSR_FILTER_MAX_RANGES" => Some(abi::MAX_RANGES as u64),
            "KVM_MSR_FILTER_MAX_BITMAP_SIZE" => Some(u64::from(abi::MAX_BITMAP_BYTES)),
            name => database::by_name(name).map(|entry| u64::from(entry.msr.0)),
        };
        known.ok_or_else(|| {
            cursor.error(format!(
                "`{name}` is not known here: give its number, or `#define` it in the same text"
            ))
        })
    }
}
