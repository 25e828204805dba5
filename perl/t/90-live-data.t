use strict;
use warnings;

use Test::More;

use lib 't/lib';
use CPANBridge::JSON;
use LiveDaemon;

plan skip_all => 'no cpanbridged in CPANBRIDGED or PATH' if !LiveDaemon->executable;

my $daemon = LiveDaemon->start(seen => <<'END');
def type_name(value):
    return type(value).__name__

def representation(value):
    return repr(value)

def code_points(text):
    return [ord(character) for character in text]

def from_code_points(points):
    return "".join(map(chr, points))

def big():
    return [2**63, 2**64 - 1, -(2**63), 1e300, 0.1, -0.0, True, None]

def infinite():
    return {"rows": [1, float("inf")]}

def keywords(first, second="-"):
    return [first, second]

def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value
END
my $bridge = $daemon->bridge;

subtest 'there and back' => sub {
    my $same = sub {
        my ($data, $name) = @_;
        is_deeply($bridge->call('test', 'echo', $data), $data, $name);
    };
    $same->({},                                   'an empty hash');
    $same->({ a => [ 1, 'x', undef, [ {} ] ], b => { c => 'd' } }, 'nested data');
    $same->([ 1, 2.5, -3, 0, 1e22, 0.1 ],         'numbers');
    $same->([ "\x{1f600}\x{20ac}\xfc\0\n\"\\\x7f" ], 'all kinds of characters');
    $same->([ "\x{fffe}\x{ffff}\x{10ffff}" ],     'non-characters');
    $same->({ "\xfc\x{1f600}" => 1, '' => 2 },    'keys');
    $same->('text',                               'a single value');
    $same->([],                                   'an empty array');
    $same->([ 'x' x 1_000_000 ],                  'a megabyte');
    $same->([ map { { id => $_, name => "n$_" } } 1 .. 5000 ], 'many rows');
    my $answer = $bridge->call('test', 'echo', [ \1, \0, undef ]);
    is(CPANBridge::JSON::encode($answer), '[true,false,null]', 'booleans and null');
    my $wrong = 0;
    srand 2;
    my @floats = grep { $_ == $_ && abs $_ != 9**9**9 } map { unpack 'd', pack 'L2', int rand 2**32, int rand 2**32 } 1 .. 2000;
    my $back = $bridge->call('test', 'echo', \@floats);
    $wrong += $floats[$_] != $back->[$_] for 0 .. $#floats;
    is($wrong, 0, 'two thousand random floats, to the last bit');
};

subtest 'what Python sees' => sub {
    my $type = sub { return $bridge->call('seen', 'type_name', [ $_[0] ]) };
    is($type->('7'),           'str',   'a string of digits');
    is($type->('007'),         'str',   '... with zeros');
    is($type->(7),             'int',   'an integer');
    is($type->(7.5),           'float', 'a float');
    is($type->(3.5 * 2),       'int',   'a whole float');
    is($type->(\1),            'bool',  'a boolean');
    is($type->(undef),         'NoneType', 'undef');
    is($type->({}),            'dict',  'a hash');
    is($type->([]),            'list',  'an array');
    is($bridge->call('seen', 'representation', [18446744073709551615]), '18446744073709551615', '64 bits');
    is($bridge->call('seen', 'representation', [0.1 + 0.2]), '0.30000000000000004', '17 digits');
    is($bridge->call('seen', 'representation', [ -1 / 9**9**9 ]), '-0.0', 'negative zero');
    require Math::BigFloat;
    is($type->(Math::BigFloat->new('0.1')),   'float', 'a Math::BigFloat');
    is($type->(Math::BigFloat->new('1e30')),  'int',   '... that is whole');
    is($bridge->call('seen', 'representation', [ Math::BigFloat->new($_) ]), $_, "Math::BigFloat $_")
        for '0.1', '-12.75', '0.30000000000000004', '1e-300', '5e-324', '1' . '0' x 30;
    my @points = (0, 0x7f, 0x80, 0xff, 0x100, 0xd7ff, 0xe000, 0xfffe, 0xffff, 0x10000, 0x10ffff);
    my $text = join '', map { chr } @points;
    is_deeply($bridge->call('seen', 'code_points', [$text]), \@points, 'characters');
    is($bridge->call('seen', 'from_code_points', [ \@points ]), $text, '... and back');
    is_deeply($bridge->call('seen', 'code_points', ["\xfc\xe9"]), [ 0xfc, 0xe9 ], 'bytes are Latin-1');
};

subtest 'what Python returns' => sub {
    my $values = $bridge->call('seen', 'big');
    is("@{$values}[0,1,2]", '9223372036854775808 18446744073709551615 -9223372036854775808', 'integers of 64 bits');
    ok($values->[3] == 1e300 && $values->[4] == 0.1, 'floats');
    ok($values->[6], 'True');
    is($values->[7], undef, 'None');
    my $reply = $bridge->call_python('seen', 'infinite');
    is($reply->{error_type}, 'UnencodableResult', 'infinity is refused');
    like($reply->{error}, qr/ result\.rows\[1\] is inf; allowed are finite numbers/, '... with its place');
    is(ref $bridge->call('seen', 'nested', [200]), 'ARRAY', 'deep data');
};

subtest 'params' => sub {
    is_deeply($bridge->call('seen', 'keywords', { first => 1, second => 2 }), [ 1, 2 ],   'a hash: keywords');
    is_deeply($bridge->call('seen', 'keywords', [ 1, 2 ]),                    [ 1, 2 ],   'an array: positional');
    is_deeply($bridge->call('seen', 'keywords', 'x'),                         [ 'x', '-' ], 'else: the one argument');
    is($bridge->call_python('seen', 'keywords')->{error_type}, 'InvalidParams', 'undef: none');
};

done_testing;
