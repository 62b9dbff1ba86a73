//! A manifest's text as trees that remember their lines, and objects out of them.
//!
//! YAML (several documents) and JSON go through one parser, since JSON is YAML in flow style. Two
//! kinds of mistake are kept apart: text that is no YAML fails as a whole, an object that does not
//! fit its kind fails alone. Both say the line. Nothing here knows files.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde::de::value::{MapDeserializer, SeqDeserializer, StringDeserializer};
use serde::de::{self, Deserialize, DeserializeOwned, Deserializer, IntoDeserializer, Visitor};

use crate::store::Object;

/// An object of a manifest, or what is wrong with it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Entry {
    /// The line where it begins.
    pub(crate) line: u32,
    pub(crate) content: Result<Arc<Object>, BadObject>,
}

/// An object that cannot be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct BadObject {
    pub(crate) kind: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) fault: Fault,
}

/// What is wrong, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Fault {
    line: Option<u32>,
    reason: String,
}

impl Fault {
    fn at(mut self, line: u32) -> Self {
        self.line = self.line.or(Some(line));
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(reason: T) -> Self {
        Self {
            line: None,
            reason: reason.to_string(),
        }
    }
}

/// All objects in a text that are of a kind that matters here.
pub(crate) fn read(text: &str) -> Result<Vec<Entry>, Fault> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_documents: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
        },
        with_snippet: false,
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let documents: Vec<Tree> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| syntax_fault(&error))?;
    let mut entries = Vec::new();
    for document in &documents {
        collect(document, "", "", &mut entries);
    }
    Ok(entries)
}

fn syntax_fault(error: &serde_saphyr::Error) -> Fault {
    let line = error
        .location()
        .and_then(|location| u32::try_from(location.line()).ok());
    let text = error.without_snippet().to_string();
    let first = text.lines().next().unwrap_or_default();
    // The line is said before, by everything that can be wrong with a file.
    let reason = first
        .rsplit_once(" at line ")
        .map_or(first, |(reason, _)| reason);
    let reason = reason.trim().to_owned();
    Fault { line, reason }
}

/// `kind` and `version` are what a typed list says about items that do not say it themselves.
fn collect(tree: &Tree, kind: &str, version: &str, entries: &mut Vec<Entry>) {
    if matches!(tree.value, Value::Null) {
        return;
    }
    let kind = tree.text("kind").unwrap_or(kind);
    let version = tree.text("apiVersion").unwrap_or(version);
    if let (Some(of), Some(items)) = (kind.strip_suffix("List"), tree.field("items")) {
        if let Value::List(items) = &items.value {
            return items
                .iter()
                .for_each(|item| collect(item, of, version, entries));
        }
        if matches!(items.value, Value::Null) {
            return;
        }
    }
    let content = match (version, kind) {
        ("v1", "Service") => tree
            .read::<core::Service>()
            .map(|o| Object::Service(Box::new(o))),
        ("v1", "Endpoints") => tree
            .read::<core::Endpoints>()
            .map(|o| Object::Endpoints(Box::new(o))),
        ("v1", "Node") => tree.read::<core::Node>().map(|o| Object::Node(Box::new(o))),
        ("discovery.k8s.io/v1", "EndpointSlice") => tree
            .read::<discovery::EndpointSlice>()
            .map(|o| Object::EndpointSlice(Box::new(o))),
        ("discovery.k8s.io/v1beta1", "EndpointSlice") => Err(de::Error::custom(
            "apiVersion discovery.k8s.io/v1beta1 is not read, write discovery.k8s.io/v1",
        )),
        (_, "") => Err(de::Error::custom(
            "no kind: this is not a Kubernetes object",
        )),
        ("", _) => Err(de::Error::custom("no apiVersion")),
        _ => return,
    };
    let content = content.and_then(named).map(Arc::new);
    let content = content.map_err(|fault: Fault| {
        let metadata = |key| {
            tree.field("metadata")
                .and_then(|metadata| metadata.text(key))
        };
        let namespace = if kind == "Node" { "" } else { "default" };
        BadObject {
            kind: if kind.is_empty() { "File" } else { kind }.into(),
            namespace: metadata("namespace").unwrap_or(namespace).into(),
            name: metadata("name").unwrap_or_default().into(),
            fault: fault.at(tree.line),
        }
    });
    entries.push(Entry {
        line: tree.line,
        content,
    });
}

/// Fills in the namespace that a client would fill in.
fn named(mut object: Object) -> Result<Object, Fault> {
    let is_node = matches!(object, Object::Node(_));
    let metadata = object.metadata_mut();
    if metadata.name.as_deref().unwrap_or_default().is_empty() {
        return Err(de::Error::custom("metadata.name is missing"));
    }
    if is_node {
        metadata.namespace = None;
    } else if metadata.namespace.as_deref().unwrap_or_default().is_empty() {
        metadata.namespace = Some("default".into());
    }
    Ok(object)
}

/// A node of a document and the line where it begins.
#[derive(Debug)]
struct Tree {
    line: u32,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
    List(Vec<Tree>),
    Map(Vec<(String, Tree)>),
}

impl Tree {
    fn field(&self, name: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(fields) => fields
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value),
            _ => None,
        }
    }

    fn text(&self, name: &str) -> Option<&str> {
        match &self.field(name)?.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    fn read<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        T::deserialize(self)
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = serde_saphyr::Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self {
            line: u32::try_from(spanned.referenced.line()).unwrap_or(0),
            value: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Signed(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = access.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(key) = access.next_key()? {
            fields.push((key, access.next_value()?));
        }
        Ok(Value::Map(fields))
    }
}

impl<'de> IntoDeserializer<'de, Fault> for &'de Tree {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for &'de Tree {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let read = match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(items) => visitor.visit_seq(SeqDeserializer::new(items.iter())),
            Value::Map(fields) => {
                let fields = fields.iter().map(|(key, value)| (key.as_str(), value));
                visitor.visit_map(MapDeserializer::new(fields))
            }
        };
        read.map_err(|fault| fault.at(self.line))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        // The API takes `cpu: 4` for `cpu: "4"`, in quantities only.
        let number = match self.value {
            Value::Signed(value) => Some(value.to_string()),
            Value::Unsigned(value) => Some(value.to_string()),
            Value::Float(value) => Some(value.to_string()),
            _ => None,
        };
        match number {
            Some(text) if name == "Quantity" => {
                visitor.visit_newtype_struct(StringDeserializer::new(text))
            }
            _ => visitor.visit_newtype_struct(self),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(text: &str) -> Vec<String> {
        let describe = |entry: Entry| match entry.content {
            Ok(object) => format!("{} {}", entry.line, object.key()),
            Err(bad) => format!(
                "{} bad {} {}/{}: {}",
                entry.line, bad.kind, bad.namespace, bad.name, bad.fault
            ),
        };
        let entries = read(text).expect("text that parses");
        entries.into_iter().map(describe).collect()
    }

    #[test]
    fn documents_and_lists_yield_the_objects_that_matter() {
        let text = "\
# a comment first
---
apiVersion: v1
kind: Service
metadata: {name: web}
---
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Node
  metadata: {name: n1, namespace: ignored}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: web-1, namespace: shop}
---
apiVersion: v1
kind: ServiceList
items:
- metadata: {name: typed}
";
        assert_eq!(
            summary(text),
            [
                "3 Service default/web",
                "15 Node n1",
                "18 EndpointSlice shop/web-1",
                "25 Service default/typed"
            ]
        );
    }

    #[test]
    fn json_is_read_with_its_lines() {
        let text = "{\n\t\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n\t\t{\"apiVersion\":\"v1\",\"kind\":\"Service\",\n\t\t \"metadata\":{\"name\":\"\\u0077eb\"}, \"spec\":{\"ports\":[{\"port\":80}]}}\n\t]\n}\n";
        assert_eq!(summary(text), ["3 Service default/web"]);
    }

    #[test]
    fn an_object_that_does_not_fit_fails_alone_and_says_the_line() {
        let text = "\
apiVersion: v1
kind: Service
metadata: {name: bad, namespace: shop}
spec:
  ports:
  - name: http
    port: eighty
---
apiVersion: v1
kind: Service
metadata: {name: good}
---
apiVersion: v1
kind: Service
---
metadata: {name: nothing}
";
        assert_eq!(
            summary(text),
            [
                "1 bad Service shop/bad: line 7: invalid type: string \"eighty\", expected i32",
                "9 Service default/good",
                "13 bad Service default/: line 13: metadata.name is missing",
                "16 bad File default/nothing: line 16: no kind: this is not a Kubernetes object",
            ]
        );
    }

    #[test]
    fn nulls_are_as_if_nothing_was_written() {
        let text = "\
apiVersion: v1
kind: Service
metadata: {name: web, labels: null, annotations: ~}
spec: {type: null, ports: [{port: 80, protocol: null, nodePort: null}], externalIPs: null}
status:
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web}
addressType: null
ports: null
endpoints: null
";
        assert_eq!(
            summary(text),
            ["1 Service default/web", "7 EndpointSlice default/web"]
        );
    }

    #[test]
    fn quantities_may_be_numbers() {
        let text = "\
apiVersion: v1
kind: Node
metadata: {name: n1}
status: {capacity: {cpu: 4, memory: 16Gi}, allocatable: {cpu: 1.5}}
";
        assert_eq!(summary(text), ["1 Node n1"]);
    }

    #[test]
    fn text_that_is_no_yaml_says_the_line() {
        let fault = read("apiVersion: v1\nkind: [Service\nmetadata: {}\n").expect_err("broken");
        assert_eq!(
            fault.to_string(),
            "line 3: illegal placement of ':' indicator"
        );
        let fault = read("{\"kind\": \"Service\",\n\"a\": }}\n").expect_err("broken");
        assert!(fault.to_string().starts_with("line 2"), "{fault}");
    }

    #[test]
    fn forms_that_people_write_are_read() {
        let odd = [
            "\u{feff}apiVersion: v1\r\nkind: Service\r\nmetadata:\r\n  name: web\r\n",
            "%YAML 1.1\n---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\n...\n",
            "apiVersion: v1\nkind: Service\nmetadata: &m {name: web}\nspec: {clusterIPs: [10.96.0.1, fd00:96::1]}\n",
            "x: &d {name: web}\napiVersion: v1\nkind: Service\nmetadata: {<<: *d, labels: {on: \"1\"}}\n",
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  annotations:\n    text: |\n      ---\n      a: [b\n",
            "apiVersion: \"v1\"\n\"kind\": 'Service'\nmetadata:\n    name: >-\n      web\nspec:\n    publishNotReadyAddresses: yes\n",
            "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"web\",\"annotations\":{\"a\":\"\\u00e4\\/\\ud83d\\ude00\"}}}",
        ];
        for text in odd {
            let told = summary(text);
            assert_eq!(told.len(), 1, "{text}");
            assert!(
                told[0].ends_with(" Service default/web"),
                "{told:?} from {text}"
            );
        }
        for nothing in ["", "\n", "# nothing\n", "---\n---\n", "null\n"] {
            assert_eq!(summary(nothing), Vec::<String>::new(), "{nothing:?}");
        }
    }

    #[test]
    fn text_that_is_not_an_object_is_named() {
        assert_eq!(
            summary("just words\n---\n- a\n- b\n"),
            [
                "1 bad File default/: line 1: no kind: this is not a Kubernetes object",
                "3 bad File default/: line 3: no kind: this is not a Kubernetes object",
            ]
        );
        assert!(read("a: 1\na: 2\n").is_err());
        assert!(read("a: *unknown\n").is_err());
    }

    #[test]
    fn large_files_are_read_whole() {
        let item = |at: usize| {
            format!(
                "- {{apiVersion: v1, kind: Service, metadata: {{name: s{at}}}, spec: {{ports: [{{port: 80}}]}}}}\n"
            )
        };
        let items: String = (0..6_000).map(item).collect();
        let entries = read(&format!("apiVersion: v1\nkind: List\nitems:\n{items}"))
            .expect("text that parses");
        assert_eq!(entries.len(), 6_000);
        let documents: String = (0..3_000)
            .map(|at| format!("---\n{}", &item(at)[2..]))
            .collect();
        assert_eq!(read(&documents).expect("text that parses").len(), 3_000);
    }

    #[test]
    fn what_kubectl_prints_is_read() {
        let text = r#"
apiVersion: v1
items:
- apiVersion: v1
  kind: Service
  metadata:
    annotations:
      kubectl.kubernetes.io/last-applied-configuration: |
        {"apiVersion":"v1","kind":"Service","metadata":{"annotations":{},"name":"web"}}
    creationTimestamp: "2026-01-02T03:04:05Z"
    managedFields:
    - apiVersion: v1
      fieldsType: FieldsV1
      fieldsV1:
        f:metadata:
          f:annotations:
            .: {}
            f:kubectl.kubernetes.io/last-applied-configuration: {}
        f:spec:
          f:ports:
            .: {}
            k:{"port":80,"protocol":"TCP"}:
              .: {}
              f:targetPort: {}
      manager: kubectl
      operation: Update
      time: 2026-01-02T03:04:05Z
    name: web
    namespace: shop
    resourceVersion: "1234"
    uid: 0a1b2c3d-0000-0000-0000-000000000000
  spec:
    clusterIP: 10.96.0.10
    clusterIPs:
    - 10.96.0.10
    - fd00:96::a
    internalTrafficPolicy: Cluster
    ipFamilyPolicy: RequireDualStack
    ports:
    - port: 80
      protocol: TCP
      targetPort: http
    selector:
      app: web
    sessionAffinity: None
    type: ClusterIP
  status:
    loadBalancer: {}
- apiVersion: v1
  kind: Node
  metadata:
    annotations:
      node.alpha.kubernetes.io/ttl: "0"
    creationTimestamp: null
    name: n1
  spec:
    podCIDR: 10.244.1.0/24
    taints:
    - effect: NoSchedule
      key: node-role.kubernetes.io/control-plane
  status:
    capacity:
      cpu: "4"
      ephemeral-storage: 100Gi
    conditions:
    - lastHeartbeatTime: "2026-01-02T03:04:05Z"
      lastTransitionTime: "2026-01-02T03:04:05Z"
      status: "True"
      type: Ready
    images:
    - names:
      - registry.example/pause:3.10
      sizeBytes: 268051
kind: List
metadata:
  resourceVersion: ""
"#;
        assert_eq!(summary(text), ["4 Service shop/web", "49 Node n1"]);
    }
}
