//! The public API of the crates that others link, an item a line, so that a change of it is seen in review.
//!
//! Read from the source: each item under the name by which a user of the crate reaches it, with what it has, derives and
//! implements. What a macro makes is not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use proc_macro2::{Ident, Span};
use syn::spanned::Spanned;
use syn::{Attribute, Fields, Generics, ImplItem, Item, ItemImpl, Signature, TraitItem, Type, UseTree, Visibility};

use crate::test;

/// The crates, by directory.
const CRATES: [&str; 7] = ["core", "engine", "plan", "msrs", "kvm", "policy", "msrgate"];

/// Where the listing is kept.
const LISTING: &str = "xtask/api.txt";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Write the listing as the source is now
    #[arg(long)]
    bless: bool,
}

pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let done = match arguments.bless {
        true => listing().and_then(|lines| {
            let text = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
            fs::write(crate::root().join(LISTING), text).map_err(|error| format!("{LISTING}: {error}"))
        }),
        false => changes().and_then(|changes| match changes.is_empty() {
            true => Ok(()),
            false => Err(changes.join("\n")),
        }),
    };
    test::tell(done.map(|()| test::one(true, format!("the API is as {LISTING} says"))))
}

/// In what the source differs from the listing.
pub(crate) fn changes() -> Result<Vec<String>, String> {
    let kept = fs::read_to_string(crate::root().join(LISTING)).map_err(|error| format!("{LISTING}: {error}"))?;
    let kept: BTreeSet<String> = kept.lines().map(str::to_owned).collect();
    let now = listing()?;
    let gone = kept.difference(&now).map(|line| format!("API gone: {line}"));
    let new = now.difference(&kept).map(|line| format!("API new: {line}"));
    let mut changes: Vec<String> = gone.chain(new).collect();
    if !changes.is_empty() {
        changes.push(format!(
            "if the API is to change, `cargo xtask api --bless` writes {LISTING}"
        ));
    }
    Ok(changes)
}

fn listing() -> Result<BTreeSet<String>, String> {
    let mut lines = BTreeSet::new();
    for name in CRATES {
        let mut source = Source::default();
        let directory = crate::root().join("crates").join(name).join("src");
        source.read(Vec::new(), &directory.join("lib.rs"), &directory)?;
        source.module(&[], name, &mut lines);
    }
    Ok(lines)
}

/// The items of a crate by the path of their module, without tests.
#[derive(Default)]
struct Source(BTreeMap<Vec<String>, Vec<Item>>);

impl Source {
    fn read(&mut self, module: Vec<String>, file: &Path, directory: &Path) -> Result<(), String> {
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let text = fs::read_to_string(file).map_err(|error| failed(&error))?;
        let items = syn::parse_file(&text).map_err(|error| failed(&error))?.items;
        self.insert(module, items, directory)
    }

    fn insert(&mut self, module: Vec<String>, mut items: Vec<Item>, directory: &Path) -> Result<(), String> {
        items.retain(|item| !matches!(item, Item::Mod(item) if attributes(&item.attrs).contains("(test)")));
        for item in &items {
            let Item::Mod(child) = item else { continue };
            let name = child.ident.to_string();
            let path = [module.clone(), vec![name.clone()]].concat();
            match &child.content {
                Some((_, items)) => self.insert(path, items.clone(), &directory.join(name))?,
                None => self.read(path, &directory.join(format!("{name}.rs")), &directory.join(&name))?,
            }
        }
        self.0.insert(module, items);
        Ok(())
    }

    /// Lists what a module shows to others, each behind `prefix`.
    fn module(&self, module: &[String], prefix: &str, lines: &mut BTreeSet<String>) {
        for item in self.0.get(module).into_iter().flatten() {
            match item {
                Item::Use(item) if is_public(&item.vis) => {
                    let note = attributes(&item.attrs);
                    for (path, name) in leaves(&item.tree) {
                        if !self.passed_on(module, &path, &name, prefix, lines) {
                            lines.insert(format!("{prefix}::{name}: {note}use {}", path.join("::")));
                        }
                    }
                }
                item => {
                    if let Some((_, name)) = named(item) {
                        self.item(module, item, &format!("{prefix}::{name}"), lines);
                    }
                }
            }
        }
    }

    /// Lists what a `use` in `module` passes on of this crate; false where that is nothing.
    fn passed_on(
        &self,
        module: &[String],
        path: &[String],
        name: &str,
        prefix: &str,
        lines: &mut BTreeSet<String>,
    ) -> bool {
        let path = path.strip_prefix(&["self".to_owned()]).unwrap_or(path);
        let Some((last, within)) = path.split_last() else {
            return false;
        };
        let at = [module, within].concat();
        if within.is_empty() || !self.0.contains_key(&at) {
            return false;
        }
        if last == "*" {
            self.module(&at, prefix, lines);
            return true;
        }
        let mut found = false;
        for item in self.0.get(&at).into_iter().flatten() {
            if let Item::Use(item) = item {
                for (path, _) in leaves(&item.tree).iter().filter(|(_, passed)| passed == last) {
                    found |= self.passed_on(&at, path, name, prefix, lines);
                }
            } else if named(item).is_some_and(|(_, ident)| ident == last) {
                self.item(&at, item, &format!("{prefix}::{name}"), lines);
                found = true;
            }
        }
        found
    }

    /// Lists an item, if it is public, and all that it has.
    fn item(&self, module: &[String], item: &Item, path: &str, lines: &mut BTreeSet<String>) {
        if !named(item).is_some_and(|(visibility, _)| is_public(visibility)) {
            return;
        }
        let mut put = |rest: String| _ = lines.insert(format!("{path}{rest}"));
        match item {
            Item::Fn(item) => put(format!(": {}", signature(&item.attrs, &item.sig))),
            Item::Const(item) => put(format!(": const {}", text(item.ty.span()))),
            Item::Type(item) => put(format!(": type {}", text(item.ty.span()))),
            Item::Mod(item) => {
                self.module(&[module, &[item.ident.to_string()]].concat(), path, lines);
            }
            Item::Struct(item) => {
                let is_open = item.fields.iter().all(|field| is_public(&field.vis));
                let private = if is_open { "" } else { " with private fields" };
                put(format!(
                    ": {}struct{}{private}",
                    attributes(&item.attrs),
                    generics(&item.generics)
                ));
                for (index, field) in item
                    .fields
                    .iter()
                    .enumerate()
                    .filter(|(_, field)| is_public(&field.vis))
                {
                    let name = field.ident.as_ref().map_or(index.to_string(), ToString::to_string);
                    put(format!(".{name}: {}", text(field.ty.span())));
                }
                self.impls(&item.ident, &mut put);
            }
            Item::Enum(item) => {
                put(format!(": {}enum{}", attributes(&item.attrs), generics(&item.generics)));
                for variant in &item.variants {
                    let fields = match &variant.fields {
                        Fields::Unit => String::new(),
                        Fields::Named(fields) => format!(" {}", text(fields.span())),
                        Fields::Unnamed(fields) => text(fields.span()),
                    };
                    put(format!("::{}{fields}", variant.ident));
                }
                self.impls(&item.ident, &mut put);
            }
            Item::Trait(item) => {
                let above: String = item
                    .supertraits
                    .iter()
                    .map(|of| format!(" {}", text(of.span())))
                    .collect();
                put(format!(": trait{}{above}", generics(&item.generics)));
                for each in &item.items {
                    match each {
                        TraitItem::Fn(each) => {
                            let provided = if each.default.is_some() { " provided" } else { "" };
                            put(format!("::{}{provided}", signature(&each.attrs, &each.sig)));
                        }
                        TraitItem::Type(each) => put(format!("::type {}", each.ident)),
                        _ => {}
                    }
                }
                // A type of this crate lists it itself.
                let own = |of: &Ident| {
                    self.0
                        .values()
                        .flatten()
                        .any(|item| named(item).is_some_and(|(_, ident)| ident == of))
                };
                let foreign = self.each_impl().filter(|each| !of_type(&each.self_ty).is_some_and(own));
                foreign
                    .filter(|each| of_trait(each) == Some(&item.ident))
                    .for_each(|each| put(head(each)));
            }
            _ => {}
        }
    }

    fn each_impl(&self) -> impl Iterator<Item = &ItemImpl> {
        self.0.values().flatten().filter_map(|item| match item {
            Item::Impl(item) => Some(item),
            _ => None,
        })
    }

    /// Lists what `impl` blocks give a type.
    fn impls(&self, name: &Ident, put: &mut impl FnMut(String)) {
        for item in self.each_impl().filter(|item| of_type(&item.self_ty) == Some(name)) {
            if item.trait_.is_some() {
                put(head(item));
                continue;
            }
            for each in &item.items {
                match each {
                    ImplItem::Fn(each) if is_public(&each.vis) => {
                        put(format!("::{}", signature(&each.attrs, &each.sig)))
                    }
                    ImplItem::Const(each) if is_public(&each.vis) => {
                        put(format!("::const {}: {}", each.ident, text(each.ty.span())));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The paths of a `use`, and the names that they get; that of a glob is `*`.
fn leaves(tree: &UseTree) -> Vec<(Vec<String>, String)> {
    match tree {
        UseTree::Path(part) => {
            let under = leaves(&part.tree).into_iter();
            under
                .map(|(path, name)| ([vec![part.ident.to_string()], path].concat(), name))
                .collect()
        }
        UseTree::Name(leaf) => vec![(vec![leaf.ident.to_string()], leaf.ident.to_string())],
        UseTree::Rename(leaf) => vec![(vec![leaf.ident.to_string()], leaf.rename.to_string())],
        UseTree::Glob(_) => vec![(vec!["*".to_owned()], "*".to_owned())],
        UseTree::Group(group) => group.items.iter().flat_map(leaves).collect(),
    }
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn named(item: &Item) -> Option<(&Visibility, &Ident)> {
    Some(match item {
        Item::Const(item) => (&item.vis, &item.ident),
        Item::Enum(item) => (&item.vis, &item.ident),
        Item::Fn(item) => (&item.vis, &item.sig.ident),
        Item::Mod(item) => (&item.vis, &item.ident),
        Item::Struct(item) => (&item.vis, &item.ident),
        Item::Trait(item) => (&item.vis, &item.ident),
        Item::Type(item) => (&item.vis, &item.ident),
        _ => return None,
    })
}

fn of_type(of: &Type) -> Option<&Ident> {
    match of {
        Type::Path(of) => of.path.segments.last().map(|last| &last.ident),
        Type::Reference(of) => of_type(&of.elem),
        _ => None,
    }
}

fn of_trait(item: &ItemImpl) -> Option<&Ident> {
    item.trait_.as_ref()?.1.segments.last().map(|last| &last.ident)
}

/// `impl`, the trait and the type.
fn head(item: &ItemImpl) -> String {
    let of = item
        .trait_
        .as_ref()
        .map(|(_, path, _)| text(path.span()))
        .unwrap_or_default();
    format!(
        ": impl{} {of} for {}",
        generics(&item.generics),
        text(item.self_ty.span())
    )
}

fn signature(of: &[Attribute], signature: &Signature) -> String {
    format!("{}{}", attributes(of), text(signature.span()))
}

fn generics(generics: &Generics) -> String {
    match generics.params.is_empty() {
        true => String::new(),
        false => text(generics.span()),
    }
}

/// The attributes that users depend on.
fn attributes(of: &[Attribute]) -> String {
    let known = ["cfg", "derive", "must_use", "non_exhaustive", "repr"];
    let of = of
        .iter()
        .filter(|of| known.iter().any(|known| of.path().is_ident(known)));
    of.map(|of| format!("{} ", text(of.span()))).collect()
}

/// The source of a part, in one line and without comments.
fn text(of: Span) -> String {
    let text = of.source_text().unwrap_or_default();
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let text = lines.collect::<Vec<&str>>().join(" ");
    text.replace("( ", "(")
        .replace(", )", ")")
        .replace(", }", " }")
        .replace(" .", ".")
}
