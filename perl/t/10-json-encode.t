use strict;
use warnings;

use Scalar::Util ();
use Test::More;

use CPANBridge::Boolean;
use CPANBridge::JSON;

sub sent { return CPANBridge::JSON::encode($_[0], '$params') }

sub refusal {
    my ($data) = @_;
    return eval { sent($data); 1 } ? 'nothing was refused' : $@->message;
}

{
    package Point;
    sub new     { my ($class, @fields) = @_; return bless {@fields}, $class }
    sub TO_JSON { my ($self) = @_; return { x => $self->{x} } }

    package Dying;
    sub TO_JSON { die "no way\n" }

    package Once;
    our $calls = 0;
    sub TO_JSON { my ($self) = @_; $calls++; return $self->{to} if exists $self->{to}; die "call $calls\n" }

    package Counting;
    our $fetched = 0;
    sub TIEHASH   { my ($class, $hash) = @_; return bless [ $hash, keys %{$hash} ], $class }
    sub TIEARRAY  { my ($class, $array) = @_; return bless [$array], $class }
    sub FETCH     { my ($self, $key) = @_; $fetched++; return ref $self->[0] eq 'HASH' ? $self->[0]{$key} : $self->[0][$key] }
    sub FETCHSIZE { return scalar @{ $_[0][0] } }
    sub FIRSTKEY  { return $_[0][1] }
    sub NEXTKEY   { my ($self, $key) = @_; my ($i) = grep { $self->[$_] eq $key } 1 .. $#{$self}; return $self->[ $i + 1 ] }

    package Circular;
    sub TO_JSON { return [ $_[0] ] }
}

subtest 'strings stay strings' => sub {
    is(sent(''),       '""',       'an empty one');
    is(sent('007'),    '"007"',    'digits with leading zeros');
    is(sent('1.0'),    '"1.0"',    'digits with a fraction');
    is(sent('1e3'),    '"1e3"',    'digits with an exponent');
    is(sent($_), qq("$_"), "the string $_") for qw(Inf inf NaN nan -inf true null 0 -1 *STDOUT Infinity);
    is(sent([ 'a', '12', 'b' ]), '["a","12","b"]', 'in an array');
    is(sent("a\"b\\c/\n\r\t\f\b\0\x1f\x7f"), qq("a\\"b\\\\c/\\n\\r\\t\\f\\b\\u0000\\u001f\x7f"), 'escapes');
    my $long = 'line "x"\\' . "\n";
    is(length sent($long x 50_000), 2 + 50_000 * (length($long) + 4), 'many escapes in a long string');
    is(sent({ "k\"\n\xfc" => 1 }), qq({"k\\"\\n\xc3\xbc":1}), 'in a key');
};

subtest 'strings are characters' => sub {
    is(sent("\xfc"),               qq("\xc3\xbc"),         'a byte string is Latin-1');
    is(sent("\x{20ac}\x{1f600}"),  qq("\xe2\x82\xac\xf0\x9f\x98\x80"), 'beyond the BMP');
    is(sent("\x{ffff}\x{10ffff}"), qq("\xef\xbf\xbf\xf4\x8f\xbf\xbf"), 'non-characters as they are');
    my $upgraded = "\xfc";
    utf8::upgrade($upgraded);
    is(sent($upgraded), sent("\xfc"), 'how Perl stores a string makes no difference');
    no warnings;
    like(refusal([ "\x{d800}" ]),      qr/\A\$params->\[0\] cannot be sent: .*U\+D800/, 'a surrogate');
    like(refusal([ chr 0x110000 ]), qr/\A\$params->\[0\] cannot be sent: .*U\+10FFFF/,  'beyond Unicode');
    like(refusal({ "\x{dfff}" => 1 }), qr/the key '\\x\{dfff\}' of \$params/, 'in a key');
};

subtest 'numbers stay numbers' => sub {
    is(sent($_), "$_", "the number $_") for 0, 1, -1, 42, 1.5, -0.25, 999999999999999;
    is(sent(18446744073709551615), '18446744073709551615', 'the largest unsigned integer');
    is(sent(-9223372036854775808), '-9223372036854775808', 'the smallest integer');
    is(sent(9007199254740993),     '9007199254740993',     'more digits than a float has');
    is(sent(6.0 * 0.5),            '3',                    'a whole float is sent without a fraction');
    is(sent($_->[0]), $_->[1], "... $_->[1]")
        for [ 1e15, '1000000000000000' ], [ -3e15, '-3000000000000000' ], [ 9007199254740992.0, '9007199254740992' ];
    is(sent(1e16), '1e+16', '... up to 2**53');
    is(sent(-1 / 9**9**9),         '-0.0',                 'negative zero');
    for my $float (0.1, 0.1 + 0.2, 1 / 3, 2.9999999999999996, 1e22, 5e-324, 1.7976931348623157e308, -1e-7) {
        my $text = sent($float);
        ok($text == $float, "$text is exact");
        like($text, qr/\A-?[0-9]+(?:\.[0-9]+)?(?:e[-+][0-9]+)?\z/, '... and JSON');
    }
    is(sent([ 12.5, -0.25, 100, 0, 1e-7, { a => 2.5 } ]), '[12.5,-0.25,100,0,' . 1e-7 . ',{"a":2.5}]', 'in arrays and hashes');
    is(sent([ 2.9999999999999996, { a => -1 / 9**9**9 } ]), '[2.9999999999999996,{"a":-0.0}]', '... just as exact');
    like(refusal({ a => [ 9**9**9 ] }),   qr/\A\$params->\{a\}\[0\] cannot be sent: an infinite/, 'infinity');
    like(refusal([ -9**9**9 ]),           qr/infinite/, 'negative infinity');
    like(refusal([ 9**9**9 / 9**9**9 ]),  qr/NaN/,      'not a number');
};

subtest 'how a value was used makes no difference' => sub {
    my ($string, $padded) = ('7', '007');
    { no warnings 'void'; $string + 0; $padded + 0 }
    is(sent([ $string, $padded ]), '["7","007"]', 'strings used in a sum');
SKIP: {
        skip 'Perl itself cannot tell before 5.36', 1 if $] < 5.035;
        my ($number, $float) = (17, 1.5);
        my $printed = "$number $float";
        is(sent([ $number, $float ]), '[17,1.5]', 'numbers that were printed');
    }
    my %data = (n => 17, list => [ 1.5 ], s => '5');
    sent(\%data) for 1 .. 2;
    like(sent(\%data), qr/"n":17\b/,  'encoding does not make strings of numbers');
    like(sent(\%data), qr/"s":"5"/, '... nor the other way round');
};

subtest 'undef and booleans' => sub {
    is(sent(undef), 'null', 'undef');
    is(sent([ \1, \0 ]), '[true,false]', 'references to 1 and 0');
    is(sent({ a => \1 }), '{"a":true}', '... in a hash');
    is(sent([ CPANBridge::Boolean::true(), CPANBridge::Boolean::false() ]), '[true,false]', 'our own');
    is(sent([ bless(\(my $yes = 1), 'JSON::PP::Boolean') ]), '[true]', "JSON::PP's and Types::Serialiser's");
SKIP: {
        skip 'no booleans in Perl before 5.36', 1 if $] < 5.035;
        is(sent([ !!1, !!0, 1 == 1 ]), '[true,false,true]', 'native ones');
    }
};

subtest 'containers and objects' => sub {
    is(sent({}), '{}', 'an empty hash');
    is(sent([]), '[]', 'an empty array');
    is(sent([ [ { a => [ 1, { b => undef } ] } ] ]), '[[{"a":[1,{"b":null}]}]]', 'nested ones');
    tie my %tied,  'Counting', { a => 1, b => 'x y', c => [1] };
    tie my @tied, 'Counting', [ 1, '2', 'x y', 3.5 ];
    is(length sent([ \%tied, \@tied ]), length '[{"a":1,"b":"x y","c":[1]},[1,"2","x y",3.5]]', 'tied ones');
    is($Counting::fetched, 7, '... of which each value is fetched once');
    my $shared = [1];
    is(sent([ $shared, $shared ]), '[[1],[1]]', 'the same array twice is no cycle');
    is(sent([ Point->new(x => 5) ]), '[{"x":5}]', 'TO_JSON');
    my $deep = [];
    $deep = [$deep] for 1 .. 20_000;
    my @warnings;
    local $SIG{__WARN__} = sub { push @warnings, @_ };
    is(length sent($deep), 40_002, 'deep nesting');
    is("@warnings", '', '... without a warning');
};

subtest 'exact numbers are sent as such, or refused by their value' => sub {
    require Math::BigRat;
    my $integer = sub { Math::BigInt->new($_[0], undef, undef) };
    my $float   = sub { Math::BigFloat->new($_[0], undef, undef) };
    my $ratio   = sub { Math::BigRat->new($_[0]) };
    my %sent = (
        $integer => [ [ 0, 0 ], map { [ $_, $_ ] } '123456789012345678901234567890', '-5', '9' x 4300 ],
        $float   => [
            [ '0', '0' ], [ '5', '5' ], [ '-12.50', '-12.5' ], [ '1200', '1200' ], [ '0.1', '0.1' ], [ '1e23', '1' . '0' x 23 ],
            [ '1e400', '1' . '0' x 400 ], [ '1e-7', '0.0000001' ], [ '-5e-324', '-5e-324' ], [ '0.30000000000000004' ],
            [ '0.1000000000000000055511151231257827021181583404541015625', '1000000000000000055511151231257827021181583404541015625e-55' ],
        ],
        $ratio => [ [ '1/2', '0.5' ], [ '-7/8', '-0.875' ], [ '1/10', '0.1' ], [ '10/5', '2' ], [ '123456789/1000', '123456.789' ] ],
    );
    my %refused = (
        $integer => [ 'NaN', 'inf', '1' . '0' x 4300 ],
        $float   => [ 'NaN', '-inf', '3.14159265358979323846264338327950288', '0.12345678901234567', '1e-400', '1e5000', '1e99999999999' ],
        $ratio   => [ 'NaN', 'inf', '1/3', '22/7' ],
    );
    for my $new ($integer, $float, $ratio) {
        is(sent($new->($_->[0])), $_->[-1], 'the number ' . substr $_->[0], 0, 60) for @{ $sent{$new} };
        like(refusal({ a => $new->($_) }), qr/\A\$params->\{a\} cannot be sent: (?!.*Math::Big)/, substr($_, 0, 60) . ' is refused')
            for @{ $refused{$new} };
    }
    my $thousandth = $float->('1.23456');
    { no warnings 'once'; local $Math::BigFloat::accuracy = 3; is(sent($thousandth), '1.23456', "the script's accuracy rounds nothing") }
    {
        local $SIG{__WARN__} = sub { };    # of Math::BigInt
        like(refusal([ bless { sign => '+' }, 'Math::BigInt' ]), qr/the value of a Math::BigInt cannot be read/,
            'one that has lost its digits, as in global destruction, is refused');
    }
    { package Price; our @ISA = ('Math::BigFloat'); sub TO_JSON { return $_[0]->bstr . ' EUR' } }
    is(sent([ Price->new('1.5') ]), '["1.5 EUR"]', 'TO_JSON of a class of its own goes first');
    my $program = 'print CPANBridge::JSON::encode([ 1, 0.1, 0.1 + 0.2, 2 ** 70, -0.5, 1e3 ])';
    for my $pragma (qw(bignum bigrat)) {
        is(`$^X -Ilib -M$pragma -MCPANBridge::JSON -e '$program'`, '[1,0.1,0.3,1180591620717411303424,-0.5,1000]', "use $pragma");
    }
};

subtest 'scalars of two kinds' => sub {
    require version;
    is(sent([ Scalar::Util::dualvar(5, 'five'), v1.2 ]), '["five","\u0001\u0002"]', 'are the strings that they show');
    like(refusal([ version->parse('1.2') ]), qr/an object of class version/, 'a version object is refused');
};

subtest 'what has no JSON form is refused with its place' => sub {
    my $cycle = { list => [ 1, {} ] };
    $cycle->{list}[1]{self} = $cycle;
    is(refusal($cycle), '$params->{list}[1]{self} cannot be sent: it refers to something that it is inside of',
        'a cycle');
    delete $cycle->{list};
    like(refusal({ a => [ 0, 0, 0, sub { } ] }), qr/\A\$params->\{a\}\[3\] cannot be sent: a CODE reference/, 'code');
    like(refusal([ \*STDOUT ]),     qr/\A\$params->\[0\] cannot be sent: a GLOB reference/, 'a file handle');
    like(refusal([*STDOUT]),        qr/\A\$params->\[0\] cannot be sent: a glob/,           'a glob');
    like(refusal(\'text'),          qr/\A\$params cannot be sent: a reference to a scalar/, 'a scalar reference');
    like(refusal([ \\1 ]),          qr/reference to a scalar/,                              'a reference to one');
    like(refusal({ 'a b' => qr/x/ }), qr/\A\$params->\{'a b'\} cannot be sent: an object of class Regexp/, 'a pattern');
    like(refusal([ bless {}, 'Dying' ]),    qr/\$params->\[0\] .*TO_JSON of class Dying died: no way/, 'a dying TO_JSON');
    like(refusal({ a => [ bless({ to => 1 }, 'Once'), bless({ to => { b => bless {}, 'Once' } }, 'Once') ] }),
        qr/\A\$params->\{a\}\[1\]\{b\} cannot be sent: TO_JSON of class Once died: call 3/, '... inside of others');
    is($Once::calls, 3, '... and none is called again for the message');
    like(refusal([ bless({ to => [ sub { } ] }, 'Once') ]), qr/\A\$params->\[0\]\[0\] cannot be sent: a CODE/, 'what TO_JSON returns');
    like(refusal([ bless {}, 'Circular' ]), qr/cannot be sent/, 'a TO_JSON that never ends');
};

subtest "the caller's variables are left alone" => sub {
    local $@ = 'before';
    local $_ = 'topic';
    sent([ 1, "a\n" ]);
    is($@, 'before', '$@');
    is($_, 'topic',  '$_');
};

done_testing;
