//! Which modules of a crate name items of which others, read from its source.
//!
//! A path counts where it stands in code that is not only a test's. A `mod` declaration is no edge, nor is a `pub use`, which
//! passes an item on: who names the item by it is taken to name the module that has it. What a macro of another crate
//! makes of its tokens is not seen, and neither is a method, which has no path.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::str::FromStr;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A module's path from the crate's root on, which is empty.
pub(crate) type Name = Vec<String>;

/// The modules of one crate.
#[derive(Default)]
pub(crate) struct Modules {
    each: BTreeMap<Name, Module>,
}

#[derive(Default)]
struct Module {
    lines: usize,
    /// The items that it defines.
    items: BTreeSet<String>,
    /// What `use` gives other names, and whether it is passed on.
    uses: HashMap<String, (Name, bool)>,
    /// The modules of which all is used.
    globs: Vec<Name>,
    /// Paths of `use` that are not passed on, and those in its code, from the root on.
    named: HashSet<Name>,
    /// Paths in code as they stand there.
    paths: HashSet<Name>,
}

impl Modules {
    /// Reads the crate whose root is this file, and all modules that it declares.
    ///
    /// # Errors
    /// A file that cannot be read, or that is no Rust.
    pub(crate) fn read(root: &Path) -> Result<Self, String> {
        let mut modules = Self::default();
        let directory = root.parent().unwrap_or(root).to_path_buf();
        let mut left = vec![(Name::new(), root.to_path_buf(), directory)];
        while let Some((name, file, directory)) = left.pop() {
            let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
            let text = fs::read_to_string(&file).map_err(|error| failed(&error))?;
            let tokens = TokenStream::from_str(&text).map_err(|error| failed(&error))?;
            let mut module = Module {
                lines: text.lines().count(),
                ..Module::default()
            };
            let mut children = Vec::new();
            let tokens: Vec<TokenTree> = tokens.into_iter().collect();
            module.read(&name, &tokens, &mut children);
            for child in children {
                let beside = directory.join(format!("{child}.rs"));
                let within = directory.join(&child);
                // What has a `#[path]` is another crate's file.
                let found = [beside, within.join("mod.rs")].into_iter().find(|file| file.is_file());
                let Some(path) = found else { continue };
                left.push((joined(&name, &child), path, within));
            }
            modules.each.insert(name, module);
        }
        Ok(modules)
    }

    /// How many lines it has outside its tests.
    pub(crate) fn lines(&self) -> usize {
        self.each.values().map(|module| module.lines).sum()
    }

    /// Which modules each module names items of.
    pub(crate) fn edges(&self) -> BTreeMap<&Name, BTreeSet<&Name>> {
        let edges = self.each.iter().map(|(name, module)| {
            let in_code = module.paths.iter().filter_map(|path| self.from(name, module, path));
            let named = module.named.iter().cloned().chain(in_code);
            let to = named.filter_map(|path| self.owner(&path)).filter(|to| *to != name);
            (name, to.collect())
        });
        edges.collect()
    }

    /// A path in a module's code, from the root on; none where it is another crate's or a local name's.
    fn from(&self, name: &Name, module: &Module, path: &Name) -> Option<Name> {
        let (first, rest) = path.split_first()?;
        let start = match module.uses.get(first) {
            Some((used, _)) => used.clone(),
            None if self.each.contains_key(&joined(name, first)) => joined(name, first),
            None => return None,
        };
        Some([start, rest.to_vec()].concat())
    }

    /// The module that has the item of this path; none where the path is that of a module.
    fn owner(&self, path: &[String]) -> Option<&Name> {
        let (name, item) = self.split(path)?;
        // An item that is not found is a macro's, or in another crate that this module uses.
        item.first().map(|_| self.defining(path, 0).unwrap_or(name))
    }

    /// A path as that of a module, as far as it is one, and what stands behind.
    fn split<'a>(&self, path: &'a [String]) -> Option<(&Name, &'a [String])> {
        let mut known = (0..=path.len()).rev();
        known.find_map(|len| {
            let (module, item) = path.split_at(len);
            Some((self.each.get_key_value(module)?.0, item))
        })
    }

    /// The module that defines the item of this path.
    fn defining(&self, path: &[String], depth: usize) -> Option<&Name> {
        let (name, item) = self.split(path)?;
        let (first, rest) = item.split_first()?;
        let module = self.each.get(name).filter(|_| depth < 8)?;
        if module.items.contains(first) {
            return Some(name);
        }
        if let Some((used, _)) = module.uses.get(first) {
            return self.defining(&[used.as_slice(), rest].concat(), depth + 1);
        }
        // Those that lead to no other module are of an enum of its own, or of another crate.
        let elsewhere = |glob: &&Name| self.split(glob).is_some_and(|(to, _)| to != name);
        let mut globs = module.globs.iter().filter(elsewhere);
        globs.find_map(|glob| self.defining(&[glob.as_slice(), item].concat(), depth + 1))
    }

    /// The circles: modules each of which names the others, in a row or through others of them.
    pub(crate) fn circles(&self) -> Vec<BTreeSet<&Name>> {
        let edges = self.edges();
        let reached: BTreeMap<&Name, BTreeSet<&Name>> =
            edges.keys().map(|name| (*name, reached(&edges, name))).collect();
        let mut circles: Vec<BTreeSet<&Name>> = Vec::new();
        for (name, others) in &reached {
            if others.contains(name) && !circles.iter().any(|circle| circle.contains(name)) {
                let both = others.iter().filter(|other| reached[**other].contains(name));
                circles.push(both.copied().collect());
            }
        }
        circles
    }
}

/// All that can be reached from a module, which is among them where it is in a circle.
fn reached<'a>(edges: &BTreeMap<&'a Name, BTreeSet<&'a Name>>, from: &Name) -> BTreeSet<&'a Name> {
    let mut reached = BTreeSet::new();
    let mut left = vec![from];
    while let Some(next) = left.pop() {
        for to in edges.get(next).into_iter().flatten() {
            if reached.insert(*to) {
                left.push(to);
            }
        }
    }
    reached
}

fn joined(name: &[String], child: &str) -> Name {
    [name, &[child.to_owned()]].concat()
}

impl Module {
    /// Reads the items of a file or of a module within it, and finds which files it declares.
    fn read(&mut self, name: &Name, tokens: &[TokenTree], children: &mut Vec<String>) {
        let mut at = 0;
        let mut public = false;
        while let Some(token) = tokens.get(at) {
            let rest = tokens.get(at + 1..).unwrap_or_default();
            at += 1;
            match token {
                TokenTree::Punct(sign) if sign.as_char() == '#' && is_for_tests(rest) => {
                    let len = item(rest);
                    let last = rest.get(len - 1).map_or(token.span(), TokenTree::span);
                    self.lines -= last.end().line - token.span().start().line + 1;
                    at += len;
                }
                TokenTree::Ident(word) => match word.to_string().as_str() {
                    "pub" => {
                        public = true;
                        at += usize::from(is_group(rest.first(), Delimiter::Parenthesis));
                        continue;
                    }
                    "use" => {
                        let len = rest.iter().position(|token| is(token, ';')).unwrap_or(rest.len());
                        self.used(name, &Name::new(), rest.get(..len).unwrap_or_default(), public);
                        at += len;
                    }
                    "mod" => {
                        let [TokenTree::Ident(child), next, ..] = rest else {
                            continue;
                        };
                        if is(next, ';') {
                            children.push(child.to_string());
                            at += 2;
                        }
                    }
                    kind @ ("fn" | "struct" | "enum" | "trait" | "type" | "const" | "static" | "union") => {
                        let words = rest.iter().map_while(|token| match token {
                            TokenTree::Ident(word) => Some(word.to_string()),
                            _ => None,
                        });
                        let mut words = words.filter(|word| word != "mut" && word != "unsafe");
                        match words.next() {
                            // The function is the item.
                            Some(word) if kind == "const" && matches!(word.as_str(), "fn" | "extern" | "async") => {}
                            Some(item) => _ = self.items.insert(item),
                            None => {}
                        }
                    }
                    first => at += self.path(name, first, rest),
                },
                TokenTree::Group(group) => {
                    let within: Vec<TokenTree> = group.stream().into_iter().collect();
                    self.read(name, &within, children);
                }
                _ => {}
            }
            public = false;
        }
    }

    /// Takes a path in code, and says how many tokens it has beside its first.
    fn path(&mut self, name: &Name, first: &str, rest: &[TokenTree]) -> usize {
        let mut path = vec![first.to_owned()];
        let mut len = 0;
        while let Some([one, two, TokenTree::Ident(next), ..]) = rest.get(len..)
            && is(one, ':')
            && is(two, ':')
        {
            path.push(next.to_string());
            len += 3;
        }
        if path.len() > 1 {
            match absolute(name, &path) {
                Some(path) => self.named.insert(path),
                None => self.paths.insert(path),
            };
        }
        len
    }

    /// Takes a tree of `use`.
    fn used(&mut self, name: &Name, prefix: &Name, tree: &[TokenTree], public: bool) {
        for part in tree.split(|token| is(token, ',')) {
            let mut path = prefix.clone();
            let mut alias = None;
            let mut glob = false;
            let mut tokens = part.iter();
            while let Some(token) = tokens.next() {
                match token {
                    TokenTree::Ident(word) if *word == "as" => {
                        alias = tokens.next().map(TokenTree::to_string);
                    }
                    TokenTree::Ident(word) if *word == "self" && !path.is_empty() => {}
                    TokenTree::Ident(word) => path.push(word.to_string()),
                    TokenTree::Group(group) => {
                        let within: Vec<TokenTree> = group.stream().into_iter().collect();
                        self.used(name, &path, &within, public);
                        path.clear();
                    }
                    token => glob |= is(token, '*'),
                }
            }
            let Some(last) = path.last().cloned() else { continue };
            // A name of the 2018 edition may also be a child's.
            let path = absolute(name, &path).unwrap_or_else(|| [name.as_slice(), &path].concat());
            if glob {
                self.globs.push(path);
                continue;
            }
            if !public {
                self.named.insert(path.clone());
            }
            self.uses.insert(alias.unwrap_or(last), (path, public));
        }
    }
}

/// A path that begins with `crate`, `self` or `super`, from the root on.
fn absolute(name: &Name, path: &[String]) -> Option<Name> {
    let (first, rest) = path.split_first()?;
    let mut start = match first.as_str() {
        "crate" => Name::new(),
        "self" => name.clone(),
        "super" => name.get(..name.len().checked_sub(1)?)?.to_vec(),
        _ => return None,
    };
    let above = rest.iter().take_while(|word| *word == "super").count();
    start.truncate(start.len().saturating_sub(above));
    Some([start.as_slice(), rest.get(above..)?].concat())
}

fn is(token: &TokenTree, sign: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == sign)
}

fn is_group(token: Option<&TokenTree>, delimiter: Delimiter) -> bool {
    matches!(token, Some(TokenTree::Group(group)) if group.delimiter() == delimiter)
}

/// Whether what follows a `#` is `[cfg(test)]` or `[cfg(all(test, …))]`.
fn is_for_tests(rest: &[TokenTree]) -> bool {
    let attribute = rest.first().map(TokenTree::to_string).unwrap_or_default();
    let attribute: String = attribute.split_whitespace().collect();
    attribute == "[cfg(test)]" || attribute.starts_with("[cfg(all(test,")
}

/// How many tokens an item has that begins with an attribute: until a semicolon or what is in braces.
fn item(rest: &[TokenTree]) -> usize {
    let end = rest
        .iter()
        .position(|token| is(token, ';') || is_group(Some(token), Delimiter::Brace));
    end.map_or(rest.len(), |end| end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(files: &[(&str, &str)]) -> Modules {
        let mut modules = Modules::default();
        for (name, text) in files {
            let name: Name = name
                .split("::")
                .filter(|part| !part.is_empty())
                .map(str::to_owned)
                .collect();
            let tokens: Vec<TokenTree> = TokenStream::from_str(text).unwrap().into_iter().collect();
            let mut module = Module {
                lines: text.lines().count(),
                ..Module::default()
            };
            module.read(&name, &tokens, &mut Vec::new());
            modules.each.insert(name, module);
        }
        modules
    }

    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let modules = modules(files);
        let circles = modules.circles().into_iter();
        circles
            .map(|circle| {
                circle
                    .into_iter()
                    .map(|name| name.join("::"))
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect()
    }

    #[test]
    fn a_parent_and_a_child_that_name_each_other_are_a_circle() {
        let child = ("a::b", "use super::One; pub(crate) fn two(_: One) {}");
        assert_eq!(
            circles(&[
                ("", "mod a;"),
                ("a", "mod b; struct One; fn f() { b::two(One) }"),
                child
            ]),
            ["a a::b"]
        );
        assert!(
            circles(&[
                ("", "mod a;"),
                ("a", "mod b; pub use b::two; pub(crate) struct One;"),
                child
            ])
            .is_empty()
        );
    }

    #[test]
    fn an_item_that_is_passed_on_is_its_own_modules() {
        let root = ("", "mod a; mod b; pub use a::{A, f as g};");
        let a = ("a", "use crate::b; pub struct A; pub fn f() { b::h() }");
        assert_eq!(circles(&[root, a, ("b", "use crate::A; pub fn h() {}")]), ["a b"]);
        assert_eq!(
            circles(&[root, a, ("b", "pub fn h() { if x { crate::g() } }")]),
            ["a b"]
        );
        assert!(circles(&[root, a, ("b", "pub fn h() {}")]).is_empty());
    }

    #[test]
    fn what_only_tests_name_is_no_circle_and_no_line() {
        let b = "pub fn h() {}\n#[cfg(test)]\nmod tests {\n    use crate::a::A;\n}\n";
        let files = [("", "mod a; mod b;"), ("a", "use crate::b::h; pub struct A;"), ("b", b)];
        assert!(circles(&files).is_empty());
        assert_eq!(modules(&files).lines(), 3);
    }

    #[test]
    fn a_module_that_is_used_as_a_word_is_named_by_what_stands_behind_it() {
        let files = [
            ("", "mod a; mod b;"),
            ("a", "mod c; pub(crate) struct A;"),
            ("a::c", "use crate::b; pub(crate) fn f() { json!({ \"x\": b::g() }) }"),
            ("b", "use crate::a; pub(crate) fn g() -> a::c::X { }"),
        ];
        assert_eq!(circles(&files), ["a::c b"]);
    }
}
